"""What pyproject.toml cannot say of the wheel: its compiled helper is loaded by ctypes, so that one file serves every
Python of a platform. Names and tags that bind an extension to one Python are replaced by those that bind nothing."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class SharedLibrary(build_ext):
    """`_native.so`, not `_native.cpython-311-x86_64-linux-gnu.so`."""

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """`py3-none-linux_x86_64`, not `cp311-cp311-linux_x86_64`."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_ext": SharedLibrary, "bdist_wheel": PlatformWheel})
