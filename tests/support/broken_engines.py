"""The server with engines that die on a poisoned image and cannot be built again.

So it is after an error of CUDA that lasts until the process ends. The workers of a server run this
module too, as their main module.
"""

from __future__ import annotations

from typing import Any, NoReturn

from service.__main__ import main
from service.engines.base import BackendError
from service.models import store
from service.models.repository import LoadedModel, Repository


def _fail(*_: Any) -> NoReturn:
    raise BackendError("CUDA error 700: an illegal memory access was encountered")


vars(store)["FIRST_PAUSE_S"] = 0.5
setattr(LoadedModel, "probe", _fail)  # noqa: B010
setattr(Repository, "rebuild", _fail)  # noqa: B010

if __name__ == "__main__":
    main()
