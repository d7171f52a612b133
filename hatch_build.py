"""Compile the native kernels while a wheel is built; where that fails the wheel is a pure Python one."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "seqzoo/kernels/native"


class NativeKernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        build = runpy.run_path(str(Path(self.root) / NATIVE / "build.py"))
        if version == "editable":
            build["build"](objects=build["LIBRARIES"] / "objects")
            return
        self.libraries = tempfile.TemporaryDirectory()
        for library in build["build"](Path(self.libraries.name)):
            build_data["force_include"][str(library)] = f"{NATIVE}/lib/{library.name}"
            build_data |= {"pure_python": False, "tag": build["wheel_tag"]()}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "libraries"):
            self.libraries.cleanup()
