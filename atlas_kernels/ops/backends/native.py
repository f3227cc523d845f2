"""Loading what `csrc` became: one binary per extension, built by `setup.py` into this folder."""

from __future__ import annotations

from pathlib import Path

import torch

FOLDER = Path(__file__).parent


class Extension:
    """A binary that implements the operators when it is loaded.

    Args:
        name: of the binary, before ``.abi3.so``.
        language: "C++" or "CUDA", for messages.
        toolchain: what builds it.
        switch: what to set for the build, if anything.
    """

    def __init__(self, name: str, language: str, toolchain: str, switch: str = "") -> None:
        self.path = FOLDER / f"{name}.abi3.so"
        self._title = f"the {language} extension"
        self._toolchain = toolchain
        self.rebuild = (
            f"`{switch}pip install --no-build-isolation --force-reinstall --no-deps .` "
            "in the checkout"
        )

    def missing(self) -> str | None:
        """That it is not built, with the remedy; None if it is."""
        if self.path.exists():
            return None
        return f"{self._title} is not built: install {self._toolchain} and run {self.rebuild}"

    def load(self) -> str | None:
        """Why it does not load, with the remedy; None if it does."""
        try:
            torch.ops.load_library(self.path)
        except OSError as error:
            # PyTorch hides the loader's words behind its own.
            return (
                f"{self._title} does not load into PyTorch {torch.__version__}, which must be 2.11 "
                f"or later ({error.__cause__ or error}): rebuild it with {self.rebuild}"
            )
        return None
