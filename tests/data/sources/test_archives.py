from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from src.data.sources import archives
from src.data.sources.archives import unpack
from src.data.sources.catalog import load_utterances
from src.utils.config import DataConfig
from src.utils.errors import DataError

KINDS = ("zip", "tar", "gztar", "bztar", "xztar")


def folder(path: Path) -> DataConfig:
    return DataConfig(source="folder", path=path)


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recordings, and one of the test's own for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    mine = tmp_path / "speech" / "mine"
    mine.mkdir(parents=True)
    (mine / "a.wav").write_bytes(b"nothing is decoded here")
    (mine / "metadata.csv").write_text("file_name,text\na.wav,hello\n")
    return mine


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_folder_is_the_folder(speech: Path, tmp_path: Path, kind: str) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), kind, speech.parent))
    (utterance,) = load_utterances(folder(archive))
    assert (utterance.id, utterance.text) == ("a.wav", "hello")
    (unpack(archive) / "a.wav").unlink()
    assert not (unpack(archive) / "a.wav").exists()  # unpacked once


@pytest.mark.usefixtures("speech")
def test_files_of_macos_are_passed_over(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("mine/metadata.csv", "file_name,text\n")
        archive.writestr("__MACOSX/mine/._metadata.csv", "")
    assert unpack(tmp_path / "mac.zip").name == "mine"


def test_a_changed_archive_is_unpacked_again(speech: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", speech))
    before = unpack(archive)
    (speech / "b.wav").write_bytes(b"")
    shutil.make_archive(str(tmp_path / "packed"), "zip", speech)
    assert unpack(archive) != before
    assert (unpack(archive) / "b.wav").exists()


def test_a_cut_archive_is_named_and_leaves_nothing(speech: Path, tmp_path: Path) -> None:
    for kind in ("zip", "gztar"):
        archive = Path(shutil.make_archive(str(tmp_path / "cut"), kind, speech))
        archive.write_bytes(archive.read_bytes()[:-30])
        with pytest.raises(DataError, match=rf"{archive.name}: cannot be unpacked .*upload it again"):
            unpack(archive)
    assert not remains(tmp_path)


def remains(tmp_path: Path) -> list[Path]:
    """What lies in the folder for temporary files, locks and our own folder excepted."""
    found = [path for path in (tmp_path / "tmp").rglob("*") if path.suffix != ".lock"]
    return [path for path in found if not path.name.startswith("whisper_asr_archives")]


Entry = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def pack_tar(path: Path, *entries: Entry, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for each in entries:
            info, content = each if isinstance(each, tuple) else (each, b"")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pack_zip(path: Path, *names: str, content: bytes = b"x", **fields: object) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in fields.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def escape_by_long_links(path: Path) -> Path:
    """CVE-2025-4517: the real path of the links is longer than PATH_MAX, where realpath stops resolving."""
    long, inside, entries = "d" * 247, "", list[Entry]()
    for step in "abcdefghijklmnop":
        entries.append(entry(f"{inside}{long}", tarfile.DIRTYPE))
        entries.append(entry(f"{inside}{step}", tarfile.SYMTYPE, long))
        inside += f"{long}/"
    last = "/".join("abcdefghijklmnop") + "/" + "l" * 254
    entries += [entry(last, tarfile.SYMTYPE, "../" * 16), entry("escape", tarfile.SYMTYPE, f"{last}/../../../")]
    return pack_tar(path, *entries, (entry("escape/PWNED"), b"new"))


def with_method(path: Path, *, method: int = 8, flag: int = 0) -> Path:
    pack_zip(path, "secret.wav")
    data = bytearray(path.read_bytes())
    local, central = data.find(b"PK\3\4"), data.find(b"PK\1\2")
    data[local + 6] |= flag
    data[central + 8] |= flag
    data[local + 8 : local + 10] = data[central + 10 : central + 12] = struct.pack("<H", method)
    path.write_bytes(data)
    return path


OUTSIDE: dict[str, Callable[[Path], Path]] = {
    "links longer than PATH_MAX": escape_by_long_links,
    "a parent folder": lambda p: pack_tar(p, (entry("a/../../evil"), b"x")),
    "an absolute name": lambda p: pack_tar(p, (entry("/etc/evil"), b"x")),
    "a folder outside": lambda p: pack_tar(p, entry("../evil", tarfile.DIRTYPE)),
    "a parent folder with backslashes": lambda p: pack_tar(p, (entry("..\\evil"), b"x")),
    "a link outside": lambda p: pack_tar(p, entry("l", tarfile.SYMTYPE, "../../evil"), (entry("l/x"), b"x")),
    "an absolute link": lambda p: pack_tar(p, entry("passwd.wav", tarfile.SYMTYPE, "/etc/passwd")),
    "a hard link outside": lambda p: pack_tar(p, entry("l", tarfile.LNKTYPE, "/etc/passwd"), (entry("l"), b"x")),
    "a link to itself": lambda p: pack_tar(p, entry("l", tarfile.SYMTYPE, "l")),
    "a link to a folder": lambda p: pack_tar(p, entry("d", tarfile.DIRTYPE), entry("l", tarfile.SYMTYPE, "d")),
    "a link to nothing": lambda p: pack_tar(p, entry("l", tarfile.SYMTYPE, "absent")),
}
SPECIAL = {"fifo": tarfile.FIFOTYPE, "character": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "unknown": b"Z"}


@pytest.mark.parametrize("attack", OUTSIDE)
@pytest.mark.usefixtures("speech")
def test_no_member_of_a_tar_file_leads_outside(tmp_path: Path, attack: str) -> None:
    before = {path for path in tmp_path.rglob("*") if tmp_path / "tmp" not in path.parents}
    archive = OUTSIDE[attack](tmp_path / "evil.tar")
    with pytest.raises(DataError, match=r"evil\.tar: .*(outside|leads to|2000)"):
        unpack(archive)
    assert not remains(tmp_path)
    assert {path for path in tmp_path.rglob("*") if tmp_path / "tmp" not in path.parents} == before | {archive}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "a/..\\..\\evil", "/"])
@pytest.mark.usefixtures("speech")
def test_no_member_of_a_zip_leads_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"evil\.zip: the member .* would lie outside"):
        unpack(pack_zip(tmp_path / "evil.zip", name))
    assert not remains(tmp_path)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.usefixtures("speech")
def test_devices_and_pipes_are_not_made(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=r"'dev' is neither file nor folder"):
        unpack(pack_tar(tmp_path / "special.tar", entry("dev", SPECIAL[kind])))
    with pytest.raises(DataError, match=r"'dev' is neither file nor folder"):
        unpack(pack_zip(tmp_path / "special.zip", "dev", create_system=3, external_attr=(stat.S_IFIFO | 0o644) << 16))
    assert not remains(tmp_path)


@pytest.mark.usefixtures("speech")
def test_a_link_to_a_file_of_the_archive_is_that_file(tmp_path: Path) -> None:
    links = entry("a/near", tarfile.SYMTYPE, "../b/clip"), entry("hard", tarfile.LNKTYPE, "./b/clip")
    found = unpack(pack_tar(tmp_path / "links.tar", *links, (entry("b/clip"), b"speech")))
    assert {(found / name).read_bytes() for name in ("a/near", "hard", "b/clip")} == {b"speech"}
    assert not any(path.is_symlink() for path in found.rglob("*"))
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr("b/clip", "speech")
        info = zipfile.ZipInfo("a/near")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "../b/clip")
    assert (unpack(tmp_path / "links.zip") / "a" / "near").read_bytes() == b"speech"


@pytest.mark.parametrize("names", [("a.wav", "a.wav"), ("a", "a/b"), ("a/b", "a"), ("a/b", "a//./b")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.usefixtures("speech")
def test_two_members_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for archive in (pack_zip(tmp_path / "twice.zip", *names), pack_tar(tmp_path / "twice.tar", *map(entry, names))):
        with pytest.raises(DataError, match=rf"{archive.name}: has two members of the name 'a"):
            unpack(archive)
    assert not remains(tmp_path)


def big(path: Path, opener: Callable[..., io.BufferedIOBase], size: int = 80 << 20) -> Path:
    """A tar file of one member of zeros."""
    info = entry("big.wav")
    info.size = size
    with opener(path, "wb") as file:
        file.write(info.tobuf())
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    return path


def overlapping(path: Path) -> Path:
    """A ZIP whose directory names one compressed file many times (Fifield 2019)."""
    pack_zip(path, "a", content=bytes(8 << 20))
    with zipfile.ZipFile(path, "a") as archive:
        (first,) = archive.infolist()
        for number in range(1000):
            copied = zipfile.ZipInfo(f"b{number}")
            for name in ("header_offset", "compress_type", "compress_size", "file_size", "CRC"):
                setattr(copied, name, getattr(first, name))
            archive.filelist.append(copied)
        archive._didModify = True
    return path


BOMBS: dict[str, Callable[[Path], Path]] = {
    "zip": lambda p: pack_zip(p / "bomb.zip", *map(str, range(40)), content=bytes(1 << 20)),
    "overlapping zip": lambda p: overlapping(p / "bomb.zip"),
    "gzip": lambda p: big(p / "bomb.tgz", gzip.open),
    "bzip2": lambda p: big(p / "bomb.tar.bz2", bz2.open),
    "xz": lambda p: big(p / "bomb.tar.xz", lzma.open),
    "zeros after the end": lambda p: trailing(p / "bomb.tar.gz", 80 << 20),
    "holes": lambda p: holes(p / "bomb.tar"),
}


def trailing(path: Path, zeros: int, after: bytes = b"") -> Path:
    pack_tar(path, (entry("a.wav"), b"x"))
    data = path.read_bytes() + bytes(zeros) + after
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def holes(path: Path) -> Path:
    """A sparse file of GNU tar: a terabyte that takes no space in the archive."""
    info = entry("holes.wav")
    info.pax_headers = {"GNU.sparse.size": str(1 << 40), "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "0"}
    return pack_tar(path, info)


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.usefixtures("speech")
def test_what_unpacks_to_far_more_than_speech_is_refused(tmp_path: Path, kind: str) -> None:
    archive = BOMBS[kind](tmp_path)
    assert archive.stat().st_size < 2 << 20
    with pytest.raises(DataError, match=r"100 times its own size|Overlapped entries"):
        unpack(archive)
    assert not remains(tmp_path)


@pytest.mark.usefixtures("speech")
def test_a_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 << 20, 0, 1 << 20))
    for archive in (
        pack_zip(tmp_path / "large.zip", "a", content=bytes(1 << 20)),
        pack_tar(tmp_path / "large.tar", (entry("a"), bytes(1 << 20))),
    ):
        with pytest.raises(DataError, match=rf"{archive.name}: unpacks to more than the 0 MB of .*TMPDIR"):
            unpack(archive)
    assert not remains(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.usefixtures("speech")
def test_the_number_of_files_is_bounded(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ALLOWED_MEMBERS", 50)
    names, path = [f"{number}.wav" for number in range(51)], tmp_path / f"many.{kind}"
    archive = pack_zip(path, *names) if kind == "zip" else pack_tar(path, *map(entry, names), mode="w:gz")
    with pytest.raises(DataError, match=r"has more than 50 files"):
        unpack(archive)
    assert not remains(tmp_path)


@pytest.mark.parametrize("name", ["d/" * 2000 + "x", "d/" * 33 + "x", "n" * 256, "\u00fc" * 128])
@pytest.mark.usefixtures("speech")
def test_deep_trees_and_long_names_are_named(tmp_path: Path, name: str) -> None:
    for archive in (pack_zip(tmp_path / "deep.zip", name), pack_tar(tmp_path / "deep.tar", (entry(name), b"x"))):
        with pytest.raises(DataError, match=rf"{archive.name}: the member '(d/d|nnn|\u00fc)") as caught:
            unpack(archive)
        assert len(str(caught.value)) < 500
    assert not remains(tmp_path)


@pytest.mark.parametrize("kind", [b"x", b"g", tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("size", [65_537, 8 << 30, -512])
@pytest.mark.usefixtures("speech")
def test_large_headers_are_not_read(tmp_path: Path, kind: bytes, size: int) -> None:
    header = entry("header", kind)
    header.size = size
    data = header.tobuf(format=tarfile.GNU_FORMAT) + bytes(1 << 20)
    (tmp_path / "header.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"header\.tar: cannot be unpacked \(a header has"):
        unpack(tmp_path / "header.tar")


@pytest.mark.usefixtures("speech")
def test_a_member_that_ends_before_it_begins_ends_the_reading(tmp_path: Path) -> None:
    info = entry("a.wav")  # CVE-2025-8194: tarfile would read it for ever
    info.size = -1024
    (tmp_path / "back.tar").write_bytes(info.tobuf(format=tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DataError, match=r"back\.tar: cannot be unpacked"):
        unpack(tmp_path / "back.tar")


@pytest.mark.usefixtures("speech")
def test_ten_thousand_headers_of_one_member_are_refused(tmp_path: Path) -> None:
    header = entry("h", b"x")
    header.size = 12
    (tmp_path / "chain.tar").write_bytes((header.tobuf() + b"12 path=abc\n".ljust(512, b"\0")) * 10_000 + bytes(1024))
    with pytest.raises(DataError, match=r"chain\.tar: cannot be unpacked"):
        unpack(tmp_path / "chain.tar")


@pytest.mark.usefixtures("speech")
def test_encrypted_and_unknown_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"locked\.zip: 'secret\.wav' is encrypted; unpack it with the password"):
        unpack(with_method(tmp_path / "locked.zip", flag=1))
    for method, name in ((9, "deflate64"), (97, "[wW]av[pP]ack"), (99, "99")):
        with pytest.raises(DataError, match=rf"'secret\.wav' is packed with .*{name}.*another program"):
            unpack(with_method(tmp_path / "method.zip", method=method))
    assert not remains(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_are_noticed_or_change_nothing(speech: Path, tmp_path: Path, kind: str) -> None:
    random.seed(kind)
    (speech / "a.wav").write_bytes(random.randbytes(20_000))
    archive = Path(shutil.make_archive(str(tmp_path / "flipped"), kind, speech))
    packed, expected = archive.read_bytes(), {p.name: p.read_bytes() for p in speech.iterdir()}
    for number in range(150):
        place = number if number < 60 else -number if number < 100 else random.randrange(len(packed))
        damaged = bytearray(packed)
        damaged[place] ^= 1 << random.randrange(8)
        archive.write_bytes(damaged)
        try:
            found = {p.name: p.read_bytes() for p in unpack(archive).iterdir()}
        except DataError as err:
            assert str(archive) in str(err)
            assert len(str(err)) < 1000
        else:  # modes, times and owners are not kept; the content of a plain tar file has no checksum
            assert kind == "tar" or found == expected, (number, place)
    for end in (*range(0, len(packed), len(packed) // 40), len(packed) - 1):
        archive.write_bytes(packed[:end])
        try:
            assert {p.name: p.read_bytes() for p in unpack(archive).iterdir()} == expected  # only padding was cut
            assert kind == "tar"
        except DataError:
            pass


@pytest.mark.usefixtures("speech")
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = pack_tar(tmp_path / "middle.tar", (entry("a.wav"), b"x"), (entry("b.wav"), b"x"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"X" + whole[1025:])
    with pytest.raises(DataError, match=r"a header is damaged"):
        unpack(path)
    path.write_bytes(whole[:2048])  # cut between two members
    with pytest.raises(DataError, match=r"the end is absent"):
        unpack(path)
    with pytest.raises(DataError, match=r"something comes after its end"):
        unpack(trailing(tmp_path / "joined.tar.gz", 0, after=whole))


@pytest.mark.usefixtures("speech")
def test_an_archive_in_an_archive_stays_one(tmp_path: Path) -> None:
    inner = pack_zip(tmp_path / "inner.zip", "a.wav")
    outer = pack_zip(tmp_path / "outer.zip", "inner.zip", content=inner.read_bytes())
    assert [path.name for path in unpack(outer).iterdir()] == ["inner.zip"]
    with pytest.raises(DataError, match="no recording and no manifest"):
        load_utterances(folder(outer))


@pytest.mark.usefixtures("speech")
def test_empty_archives_and_other_files_are_refused(tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    pack_tar(tmp_path / "empty.tar.gz", mode="w:gz")
    for name, content in (("no.zip", b"Rar!"), ("no.tar", b"Rar!" * 1000), ("none.tar", b""), ("none.tgz", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("empty.zip", "empty.tar.gz", "no.zip", "no.tar", "none.tar", "none.tgz"):
        with pytest.raises(DataError, match=rf"{name}: (the archive is empty|cannot be unpacked)"):
            unpack(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
@pytest.mark.parametrize("taken", ["open", "link", "file"])
def test_a_folder_that_others_can_enter_is_not_used(speech: Path, tmp_path: Path, taken: str) -> None:
    ours = tmp_path / "tmp" / f"whisper_asr_archives-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if taken == "open":
        ours.mkdir()
        ours.chmod(0o777)
    elif taken == "link":
        ours.symlink_to(elsewhere)
    else:
        ours.write_text("")
    found = unpack(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", speech)))
    assert ours not in found.parents
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert not list(elsewhere.iterdir())
    assert found.parent == unpack(tmp_path / "packed.zip").parent  # the same one in a process


def test_nobody_else_can_read_what_was_unpacked(speech: Path, tmp_path: Path) -> None:
    found = unpack(Path(shutil.make_archive(str(tmp_path / "packed"), "gztar", speech.parent)))
    for path in (found, *list(found.parents)[:2]):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert (found / "a.wav").read_bytes() == (speech / "a.wav").read_bytes()
