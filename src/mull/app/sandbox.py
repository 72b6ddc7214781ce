"""What ``mull sandbox doctor`` prints."""

from collections.abc import Collection

from mull.evaluation.sandbox import LAYERS, doctor


def sandbox_doctor(allow_weak: Collection[str] = ()) -> bool:
    """Print each layer, whether it is active, and what the probe saw.

    Args:
        allow_weak: Layers that may be missing.

    Returns:
        Whether programs may run: nothing is missing but what is allowed.

    Raises:
        ValueError: an unknown layer.
    """
    if unknown := sorted(set(allow_weak) - LAYERS.keys()):
        raise ValueError(f"{unknown[0]} is no layer of the sandbox; there are {', '.join(LAYERS)}.")
    layers = doctor()
    for layer in layers:
        state = "active" if layer.active else "allowed" if layer.name in allow_weak else "MISSING"
        print(f"{layer.name:<13}{state:<9}{LAYERS[layer.name]} [{layer.detail}]")
    missing = [layer.name for layer in layers if not layer.active]
    refused = [name for name in missing if name not in allow_weak]
    if not missing:
        print(f"All {len(layers)} layers are active.")
    elif not refused:
        print(f"{', '.join(missing)} missing, which is allowed.")
    else:
        flags = " ".join(f"--allow-weak-sandbox={name}" for name in refused)
        print(f"{', '.join(refused)} missing: programs are refused, unless {flags}.")
    return not refused
