# SPDX-License-Identifier: Apache-2.0
"""Pack vLLM, this package and what both need for a GPU machine that has torch but no network.

scripts/gpu_bundle.sh calls this and adds join.sh. From vLLM's CUDA wheel go the Python files and
the compiled libraries that mixed MoE models need, the machine code of other GPUs taken out; then
the wheels that vLLM's metadata asks for and the machine lacks. vLLM's libraries are built for
torch's stable ABI: the machine's own torch serves.
"""

import argparse
import hashlib
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent

# In vllm/: the compiled libraries that go; every other one of the wheel stays here.
LIBRARIES = (
    "_C_stable_libtorch", "_moe_C_stable_libtorch", "cumem_allocator", "spinloop", "fs_io_C",
)  # fmt: skip
# On a CUDA platform vLLM's layers do not import without one of them, whatever attention is chosen.
FLASH_ATTENTION = {"2": "vllm_flash_attn/_vllm_fa2_C", "3": "vllm_flash_attn/_vllm_fa3_C"}
DEEP_GEMM = "third_party/deep_gemm"
# The Rust front end; kernels of compute 10.0; tokenizers of Mistral's models.
BULK = ("vllm/vllm-rs", "vllm/third_party/fmha_sm100", "mistral_common/data")

# What comes with the machine's driver and torch: never carried.
NEVER = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-.*|flashinfer-.*|cuda-.*")
# Kernels, loaders and tools that vLLM imports only where they are used; --with NAME carries one.
OPTIONAL = frozenset(
    "torchcodec pynvvideocodec tilelang nvtx fastsafetensors instanttensor quack-kernels "
    "tokenspeed-mla humming-kernels opencv-python-headless fastapi-cli pycountry".split()
)
# Seen on the machine that docs/gpu.md describes (Python 3.12, torch 2.11.0+cu130).
HAVE = """
accelerate aiofiles aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs certifi
charset-normalizer click cloudpickle contourpy cycler einops filelock fonttools frozenlist fsspec
grpcio h11 hf-xet httpcore httpx huggingface-hub==1.33.0 idna jinja2 kiwisolver llvmlite markdown
markdown-it-py markupsafe matplotlib mdurl ml-dtypes mpmath multidict networkx ninja numba
numpy==2.5.2 opencv-python-headless packaging pandas pillow pip pluggy prometheus-client propcache
protobuf psutil py-cpuinfo pygments pyparsing pytest python-dateutil pyyaml regex requests rich
safetensors==0.8.0 scipy sentencepiece setuptools shellingham six sympy tiktoken tokenizers==0.23.2
torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0 tqdm transformers==5.17.0 triton==3.6.0 typer
typing-extensions typing-inspect urllib3 uvloop werkzeug wrapt yarl
"""
OURS_NEED = ("huggingface_hub", "numpy", "pydantic>=2", "PyYAML>=6", "rich", "tqdm", "pytest")
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)

FATBIN = struct.pack("<IHH", 0xBA55ED50, 1, 16)
ENTRY = struct.Struct("<HHIQIIHHI")  # kind, -, header, payload, packed, -, minor, major, arch
PTX, CUBIN = 1, 2


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prune(library: Path, arch: int) -> int:
    """Take out what a GPU of compute capability ``arch`` / 10 does not run; returns the bytes.

    Of each fat binary the cubins of this architecture stay, else the best of its generation, else
    the newest PTX that the driver can compile for it. What stays moves to the front, and zeros
    take the rest, so that no address in the library changes. Layout: NVIDIA's fatbinary_section.h
    (16 bytes, then entries), entries as cuobjdump lists them.

    Raises:
        ValueError: a fat binary is laid out in a way that is not known.
    """
    data = bytearray(library.read_bytes())
    removed = end = 0
    while (start := data.find(FATBIN, end)) >= 0:
        (size,) = struct.unpack_from("<Q", data, start + 8)
        at, end = start + 16, start + 16 + size
        entries = []
        while at < end:
            kind, _, header, payload, *_, sm = ENTRY.unpack_from(data, at)
            if kind not in (PTX, CUBIN) or header < ENTRY.size or at + header + payload > end:
                raise ValueError(f"{library.name}: unknown entry at byte {at}; use --arch all")
            entries.append((kind, sm, bytes(data[at : at + header + payload])))
            at += header + payload
        near = [sm for kind, sm, _ in entries if kind == CUBIN and arch // 10 * 10 <= sm <= arch]
        text = [sm for kind, sm, _ in entries if kind == PTX and sm <= arch]
        best = (CUBIN, max(near)) if near else (PTX, max(text, default=-1))
        kept = b"".join(entry for kind, sm, entry in entries if (kind, sm) == best)
        # Where nothing fits, one entry that never did stays: who reads it may expect one.
        kept = kept or min((entry for _, _, entry in entries), key=len, default=b"")
        struct.pack_into("<Q", data, start + 8, len(kept))
        data[start + 16 : end] = kept.ljust(size, b"\0")
        removed += size - len(kept)
    library.write_bytes(data)
    return removed


def pip(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments],
        stdout=sys.stderr,
    )
    if run.returncode:
        raise SystemExit(f"gpu_bundle: pip {' '.join(arguments[:4])} ... failed")


def platform_tags(python: str) -> list[str]:
    tags = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    chosen = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    for tag in tags:
        chosen += ["--platform", tag]
    return chosen


def download(requirements: list[str], folder: Path, python: str) -> None:
    pip("download", "--no-deps", "-d", str(folder), *platform_tags(python), *requirements)


def wheels_in(folder: Path) -> dict[str, Path]:
    """Name -> wheel."""
    return {parse_wheel_filename(file.name)[0]: file for file in sorted(folder.glob("*.whl"))}


def requirements_of(wheel: Path, extras: set[str], python: str) -> Iterator[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    where |= {"platform_machine": "x86_64", "sys_platform": "linux", "platform_system": "Linux"}
    for text in metadata.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**where, "extra": e}) for e in {"", *extras}):
            yield requirement


def read_have(text: str) -> dict[str, str]:
    """Name -> version, "" where it is not told: names, or the lines of pip freeze."""
    found = {}
    for line in text.splitlines():
        for word in line.partition("#")[0].split():
            name, _, number = word.partition("==")
            found[canonicalize_name(name)] = number
    return found


def collect(vllm: Path, folder: Path, have: dict[str, str], options: argparse.Namespace) -> None:
    """Download what vLLM and this package need and the machine lacks, need by need."""
    optional = OPTIONAL - set(options.include)
    wanted = [*requirements_of(vllm, set(), options.python), *map(Requirement, OURS_NEED)]
    seen: dict[str, set[str]] = {}
    while wanted:
        batch: dict[str, Requirement] = {}
        later = []
        for need in wanted:
            name = canonicalize_name(need.name)
            if name in have and name not in options.include:
                if have[name] and not need.specifier.contains(have[name], prereleases=True):
                    say(f"  {name} {have[name]} is there; {need} is asked for (--with {name})")
                continue
            if NEVER.fullmatch(name) or name in optional or name in options.without:
                continue
            if name in seen and need.extras <= seen[name]:
                continue
            if name in seen:  # here already: its extras' needs are new
                later += requirements_of(wheels_in(folder)[name], need.extras, options.python)
                seen[name] |= need.extras
            elif name in batch:
                batch[name].extras |= need.extras
                batch[name].specifier &= need.specifier
            else:
                batch[name] = need
        if batch:
            say(f"downloading {', '.join(sorted(batch))}")
            here = wheels_in(folder)
            lines = [f"{n.name}{n.specifier}" for name, n in batch.items() if name not in here]
            if lines:
                download(lines, folder, options.python)
            here = wheels_in(folder)
            for name, need in batch.items():
                seen[name] = set(need.extras)
                later += requirements_of(here[name], need.extras, options.python)
        wanted = later
    for name, wheel in wheels_in(folder).items():
        if name not in seen:
            wheel.unlink()


def own_wheel(folder: Path) -> None:
    """Build this package's wheel from a copy, so that the tree stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "source"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            copy.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        for name in ("vllm_mixprec", "patches"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        pip("wheel", "--no-deps", "-w", str(folder), str(copy))


def strip_vllm(site: Path, options: argparse.Namespace) -> None:
    """Remove from the unpacked vLLM what does not go; prune what does.

    Raises:
        SystemExit: the wheel lacks a library, so it is of a version that is not known here.
    """
    top = site / "vllm"
    chosen = [*LIBRARIES, *(FLASH_ATTENTION[number] for number in options.flash_attn)]
    chosen += [f"{DEEP_GEMM}/_C_extension"] * options.deep_gemm
    found = {str(p.relative_to(top)).split(".")[0]: p for p in top.rglob("*.so")}
    if missing := [name for name in chosen if name not in found]:
        raise SystemExit(f"gpu_bundle: this vLLM has no {missing}; expected 0.32 or 0.33")
    for name, library in found.items():
        if name not in chosen:
            library.unlink()
        elif options.arch != "all":
            say(f"  {name}: {prune(library, int(options.arch)) / 1e6:.0f} MB of other GPUs' code")
    for path in [site / name for name in BULK] + [top / DEEP_GEMM] * (not options.deep_gemm):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def pack(site: Path, out: Path, part_bytes: int, facts: list[str]) -> list[Path]:
    """Write the tar.xz of ``site`` in parts, and MANIFEST; returns the parts."""
    whole = out / "whole.tar.xz"

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    xz = shutil.which("xz")
    command = [xz or sys.executable, "-T0", "-6"] if xz else []
    with whole.open("wb") as file:
        if command:
            packer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file)
            assert packer.stdin is not None
            with tarfile.open(fileobj=packer.stdin, mode="w|") as archive:
                archive.add(site, ".", filter=plain)
            packer.stdin.close()
            if packer.wait():
                raise SystemExit("gpu_bundle: xz failed")
        else:
            with (
                lzma.open(file, "wb") as stream,
                tarfile.open(fileobj=stream, mode="w|") as archive,
            ):
                archive.add(site, ".", filter=plain)
    lines, parts = list(facts), []
    total = hashlib.sha256()
    with whole.open("rb") as file:
        while chunk := file.read(part_bytes):
            parts.append(out / f"part-{len(parts):02d}")
            parts[-1].write_bytes(chunk)
            total.update(chunk)
            lines.append(f"{parts[-1].name} {len(chunk)} {hashlib.sha256(chunk).hexdigest()}")
    lines.append(f"whole {whole.stat().st_size} {total.hexdigest()}")
    whole.unlink()
    (out / "MANIFEST").write_text("\n".join(lines) + "\n")
    return parts


def folder_bytes(site: Path) -> Counter[str]:
    """Top-level name, or library of vLLM -> bytes."""
    sizes: Counter[str] = Counter()
    for file in site.rglob("*"):
        if file.is_file() and not file.is_symlink():
            name = file.relative_to(site)
            big = file.suffix == ".so" and name.parts[0] == "vllm"
            sizes[str(name) if big else name.parts[0]] += file.stat().st_size
    return sizes


def commit() -> str:
    run = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_bundle.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for the parts, new or empty")
    parser.add_argument("--list", action="store_true", help="print what would go; writes nothing")
    parser.add_argument("--vllm", default="0.33.0", help="version (default 0.33.0)")
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default 3.12)")
    parser.add_argument(
        "--arch", default="90", help='compute capability x 10 (default 90), or "all"'
    )
    parser.add_argument("--have", type=Path, help="pip freeze of the machine (default: built in)")
    parser.add_argument(
        "--flash-attn",
        choices=("2", "3", "23"),
        help="FlashAttention (default 3 for compute capability 9.0, else 2); vLLM needs one",
    )
    parser.add_argument("--deep-gemm", action="store_true", help="carry DeepGEMM")
    parser.add_argument("--with", dest="include", action="append", default=[], metavar="NAME")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    parser.add_argument("--part-mb", type=float, default=60, help="of a part at most (default 60)")
    parser.add_argument("--cache", type=Path, help="keep downloaded wheels here for a next time")
    options = parser.parse_args()
    if options.out is None and not options.list:
        parser.error("name a folder for the parts, or ask for --list")
    if options.out and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; expected a new folder")
    options.flash_attn = options.flash_attn or ("3" if options.arch == "90" else "2")
    have = read_have(options.have.read_text() if options.have else HAVE)
    with tempfile.TemporaryDirectory(prefix="gpu_bundle.") as scratch:
        cache = options.cache or Path(scratch) / "cache"
        big, small, site = cache / "vllm", cache / "needs", Path(scratch) / "site"
        for folder in (big, small):
            folder.mkdir(parents=True, exist_ok=True)
        if not list(big.glob(f"vllm-{options.vllm}-*.whl")):
            say(f"downloading vLLM {options.vllm} for CUDA")
            download([f"vllm=={options.vllm}"], big, options.python)
        (vllm,) = big.glob(f"vllm-{options.vllm}-*.whl")
        collect(vllm, small, have, options)
        own_wheel(Path(scratch))
        needs = wheels_in(small)
        wheels = [vllm, *needs.values(), *Path(scratch).glob("vllm_mixprec-*.whl")]
        say("unpacking")
        chosen = ["install", "--no-deps", "--no-compile", "--no-index", "--target", str(site)]
        pip(*chosen, *platform_tags(options.python), *map(str, wheels))
        strip_vllm(site, options)
        for name, size in folder_bytes(site).most_common():
            if options.list or size > 5e6:
                print(f"{size / 1e6:9.1f} MB  {name}")
        print(f"{sum(folder_bytes(site).values()) / 1e6:9.1f} MB  in all, unpacked")
        if options.list:
            return
        facts = ["# vllm-mixprec GPU bundle: `bash join.sh DEST` checks the parts and unpacks them"]
        facts += [f"vllm {options.vllm}", f"python {options.python}", f"arch {options.arch}"]
        facts += [f"commit {commit()}"]
        facts += [f"package {n} {parse_wheel_filename(w.name)[1]}" for n, w in needs.items()]
        options.out.mkdir(parents=True, exist_ok=True)
        say("compressing")
        parts = pack(site, options.out, int(options.part_mb * 1e6), facts)
    for part in parts:
        print(f"{part.stat().st_size / 1e6:9.1f} MB  {part.name}")
    print(f"{sum(p.stat().st_size for p in parts) / 1e6:9.1f} MB  in {len(parts)} parts")


if __name__ == "__main__":
    main()
