"""An S3 server on this machine (moto). A test file that wants it says ``pytest_plugins = ["s3_server"]``."""

import logging
from collections.abc import Iterator
from itertools import count

import pytest

REGION = "us-east-1"
_numbers = count()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Endpoint of a running server; the environment of this process, and of those it starts, points to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # one line per request
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_MAX_ATTEMPTS": "1",  # lost connections fail at once
        }.items():
            environment.setenv(name, value)
        yield endpoint
    server.stop()


@pytest.fixture
def bucket(s3: str) -> str:
    """URL of an empty bucket."""
    import s3fs

    url = f"s3://bucket-{next(_numbers)}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(url)
    return url
