"""What the host made for a step, on the step's device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """`array` on `device`: the memory itself on a CPU; else a copy that is queued and not waited for.

    From pageable memory the driver would wait for all that was queued before; torch's pinned memory is given away
    again only when the copy is done.
    """
    here = torch.from_numpy(array)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)
