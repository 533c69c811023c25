"""What chips deliver, by their data sheets."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Figures of a data sheet.

    Attributes:
        flops: dense bfloat16 FLOP/s at peak.
        hbm: bytes of device memory.
        bandwidth: bytes a second to and from it.
        network: bytes a second in and out over all links to other chips of the slice.
        kinds: parts of jax's `device_kind` that tell it.
        matrix_unit: rows and columns of a TPU's systolic array.
        clock: cycles a second of a TPU's core, from which its peak follows.
    """

    flops: float
    hbm: float
    bandwidth: float
    network: float
    kinds: tuple[str, ...]
    matrix_unit: int = 128
    clock: float = 1.0


# TPUs: cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e. GPUs: NVIDIA data sheets, SXM modules,
# without sparsity. The first whose kind matches is taken: "TPU v5" would match "TPU v5 lite" too.
CHIPS = {
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9, ("TPU v6",), matrix_unit=256, clock=1.75e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), clock=1.5e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, ("TPU v5",), clock=1.75e9),
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, ("TPU v4",)),
    "b200": Chip(2250e12, 180e9, 8000e9, 1800e9, ("B200",)),
    "h200": Chip(989e12, 141e9, 4800e9, 900e9, ("H200",)),
    "h100": Chip(989e12, 80e9, 3350e9, 900e9, ("H100",)),
    "a100": Chip(312e12, 80e9, 2039e9, 600e9, ("A100",)),
    "l4": Chip(121e12, 24e9, 300e9, 32e9, ("L4",)),
}


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device; None for CPUs and devices not in the table."""
    known = (chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds))
    return next(known, None)
