"""Compiles the native libraries on install; everything else is in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_builder():
    """mekernels/native/build.py without importing mekernels, which needs torch."""
    spec = importlib.util.spec_from_file_location(
        "mekernels_build", ROOT / "mekernels" / "native" / "build.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Ninja instead of distutils: plain shared libraries that know nothing of Python."""

    def run(self):
        builder = load_builder()
        package = ROOT if self.inplace else Path(self.build_lib)
        self.destination = package / "mekernels" / "_native"
        builder.build(self.destination, ROOT / "build" / "mekernels", verbose=self.verbose > 1)

    def get_outputs(self):
        names = ("libmek_cpu.so", "libmek_cuda.so", "build_report.json")
        folder = Path(self.build_lib) / "mekernels" / "_native"
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]


class PlatformWheel(bdist_wheel):
    """The libraries depend on the platform and not on the Python version."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("mekernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
