"""Build of the extension ``molae._core`` and of the OpenBLAS that goes with it.

Switches, all read from the environment:

``MOLAE_BLAS=system``   link the system's OpenBLAS (pkg-config) instead of the pinned wheel's
``MOLAE_SANITIZE``      comma-separated sanitizers, such as ``address,undefined``
``MOLAE_COVERAGE=1``    gcov instrumentation
``MOLAE_DEBUG=1``       no optimization, assertions on, fresh memory filled with NaN
``MOLAE_WERROR=1``      warnings are errors
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib.metadata import distribution
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).resolve().parent
os.chdir(HERE)

# The vendored library goes by a file name and an soname of molae's own, so that the dynamic
# loader never takes another package's copy for it. Both names have the same length.
WHEEL_SONAME = b"libscipy_openblas.so"
OWN_SONAME = b"libmolae_openblas.so"

# Libraries that any glibc system has; the vendored OpenBLAS may need no others.
SYSTEM_LIBRARIES = ("libc.so", "libm.so", "libpthread.so", "ld-linux", "libdl.so", "librt.so")

WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wstrict-prototypes"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {
    "csrc/kern/avx2.c": AVX2,
    "csrc/kern/avx2_rows.c": AVX2,
    "csrc/kern/avx2_stream.c": AVX2,
    "csrc/kern/avx512.c": AVX512,
    "csrc/kern/avx512_rows.c": AVX512,
    "csrc/kern/avx512_stream.c": AVX512,
    "csrc/kern/avx512_pack.c": AVX512,
    "csrc/kern/avx512bf16.c": [*AVX512, "-mavx512bf16"],
    "csrc/kern/amx.c": AMX,
    "csrc/kern/amx_stream.c": AMX,
}

ON = ("1", "yes", "true", "on")


def switch(name: str) -> bool:
    """True if the environment turns a switch on."""
    return os.environ.get(name, "").lower() in ON


def version() -> str:
    """The version, of which molae/_version.py is the single source."""
    text = Path("molae/_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def needed_libraries(library: Path) -> list[str]:
    """The DT_NEEDED names of a shared library, through readelf where there is one."""
    try:
        out = subprocess.run(
            ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return re.findall(r"\(NEEDED\).*\[(.+)\]", out)


def vendor_openblas(folder: Path) -> Path:
    """Copy the build requirement's OpenBLAS into `folder` under molae's own name and soname."""
    try:
        import scipy_openblas32
    except ImportError:
        sys.exit(
            "molae: the build needs OpenBLAS. Type\n\n"
            "    python -m pip install scipy-openblas32\n\n"
            "or, for the system's library (apt install libopenblas-dev pkg-config),\n\n"
            "    MOLAE_BLAS=system python -m pip install ."
        )
    source = Path(scipy_openblas32.get_lib_dir()) / scipy_openblas32.get_library(fullname=True)
    foreign = [n for n in needed_libraries(source) if not n.startswith(SYSTEM_LIBRARIES)]
    if foreign:
        sys.exit(
            f"molae: {source.name} needs {', '.join(foreign)}, which would not travel with the "
            "package. Use the pinned scipy-openblas32, or MOLAE_BLAS=system."
        )
    data = source.read_bytes()
    entry = b"\0" + WHEEL_SONAME + b"\0"
    if data.count(entry) != 1:
        sys.exit(
            f"molae: the soname {WHEEL_SONAME.decode()} is not where it was in {source}. "
            "Use the pinned scipy-openblas32, or MOLAE_BLAS=system."
        )
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / OWN_SONAME.decode()
    target.unlink(missing_ok=True)  # a running process may have the old one mapped
    target.write_bytes(data.replace(entry, b"\0" + OWN_SONAME + b"\0"))
    target.chmod(0o755)
    licence = next(f for f in distribution("scipy-openblas32").files if f.name == "LICENSE.txt")
    (folder / "LICENSE-OpenBLAS.txt").write_bytes(Path(licence.locate()).read_bytes())
    return target


def system_openblas() -> tuple[list[str], list[str]]:
    """Compile and link flags of the system's OpenBLAS."""
    pkg_config = os.environ.get("PKG_CONFIG", "pkg-config")
    try:
        flags = [
            shlex.split(
                subprocess.run(
                    [pkg_config, what, "openblas"], capture_output=True, text=True, check=True
                ).stdout
            )
            for what in ("--cflags", "--libs")
        ]
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            "molae: MOLAE_BLAS=system, but pkg-config knows no 'openblas'. Type\n\n"
            "    sudo apt install libopenblas-dev pkg-config\n\n"
            "or build without MOLAE_BLAS to use the vendored library."
        )
    return flags[0], flags[1]


def define_text(name: str, text: str) -> tuple[str, str]:
    """A macro whose value is a C string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return name, f'"{escaped}"'


class BuildExt(build_ext):
    """Adds per-file ISA flags, NumPy's headers and the BLAS."""

    def run(self) -> None:
        import numpy

        (ext,) = self.extensions
        ext.include_dirs.append(numpy.get_include())
        if os.environ.get("MOLAE_BLAS", "") == "system":
            cflags, libs = system_openblas()
            ext.extra_compile_args += cflags
            ext.extra_link_args += libs
            if self.inplace:  # what an earlier build with the vendored library left
                shutil.rmtree(HERE / "molae" / ".libs", ignore_errors=True)
        else:
            libs_folder = Path(self.build_lib) / "molae" / ".libs"
            library = vendor_openblas(libs_folder)
            ext.define_macros += [("MLI_BLAS_PREFIX", "scipy_"), ("MLI_BLAS_VENDORED", "1")]
            ext.library_dirs.append(str(libs_folder))
            ext.libraries.append(library.name.removeprefix("lib").removesuffix(".so"))
            ext.extra_link_args.append("-Wl,-rpath,$ORIGIN/.libs")
            if self.inplace:
                vendor_openblas(HERE / "molae" / ".libs")
        super().run()

    def accepts(self, flags: list[str]) -> bool:
        """True if the compiler knows the flags; gcc before 11 has no AMX, before 10 no bf16.

        Without them a file of kernels is empty, and `molae.show_config` does not list its set.
        """
        probe = Path(self.build_temp) / "probe.c"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("int mli_probe;\n", encoding="utf-8")
        try:
            self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=flags)
        except CompileError:
            print(f"molae: the compiler does not know {' '.join(flags)}: built without")
            return False
        return True

    def build_extension(self, ext: Extension) -> None:
        args = list(ext.extra_compile_args)
        macros = list(ext.define_macros)
        macros += [
            define_text("MLI_VERSION", version()),
            define_text("MLI_BUILD_FLAGS", " ".join(args)),
        ]
        ext.define_macros = macros
        machine = sysconfig.get_platform()
        special = ISA_FLAGS if machine.endswith("x86_64") else {}
        for source in [s for s in ext.sources if s in special]:
            flags = special[source] if self.accepts(special[source]) else []
            ext.sources.remove(source)
            ext.extra_objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=args + flags,
                depends=ext.depends,
            )
        super().build_extension(ext)


def extension() -> Extension:
    """The extension with the flags that the switches ask for."""
    sanitize = os.environ.get("MOLAE_SANITIZE", "")
    compile_args = ["-std=c11", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]
    # Nobody reads the floating-point flags, or errno; loops with a comparison or a root
    # vectorize. Values stay.
    compile_args += ["-fno-trapping-math", "-fno-math-errno"]
    link_args = ["-lm"]
    macros = []
    undefine = []
    if switch("MOLAE_DEBUG"):
        compile_args += ["-O0", "-g"]
        macros.append(("MLI_DEBUG", "1"))
        undefine.append("NDEBUG")
    else:
        compile_args += ["-O3", "-g0"]
        macros.append(("NDEBUG", "1"))
    if sanitize:
        flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"]
        compile_args += [*flags, "-fno-sanitize-recover=all"]
        link_args += flags
    if switch("MOLAE_COVERAGE"):
        compile_args.append("--coverage")
        link_args.append("--coverage")
    if switch("MOLAE_WERROR"):
        compile_args.append("-Werror")
    return Extension(
        "molae._core",
        sources=sorted(
            f for d in ("py", "fit", "ops", "base", "kern") for f in glob(f"csrc/{d}/*.c")
        ),
        depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h") + ["setup.py"]),
        define_macros=macros,
        undef_macros=undefine,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
