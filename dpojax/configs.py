"""The shipped configs as modules, wherever they lie: `from dpojax.configs import tldr`.

A config of one's own starts from one of them; `--config=tldr` reads the same files.
"""

from typing import TYPE_CHECKING, Any

from dpojax.config.shipped import shipped_folder

# A module with a path is a package: its modules are the files of this folder.
__path__ = [str(shipped_folder())]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
