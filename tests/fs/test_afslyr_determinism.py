"""One tar makes one file: in every encoding, every process and every version of the code.

The golden digests change only with the version of the format (docs/afslyr.md, "Versions"), for nodes compare files by them.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.testbed import encodings, largelayers, layerkinds, tars
from tests.testbed.ourroots import convert_bytes

KINDS: Mapping[str, Callable[[], bytes]] = {**layerkinds.KINDS, "every_kind": tars.every_kind_tar}
LARGE: Mapping[str, Callable[[], bytes]] = {"many": largelayers.many, "sources": largelayers.sources}
# By kind: the first 16 hex digits of the tar's sha256, so that a changed fixture tells itself; and the root digest.
GOLDEN: Mapping[str, tuple[str, str]] = {
    "names": ("7c7a342ae3a0f30a", "3eb4997d50f8132c61908aa5872793c41e893680fc6cbe10dee0e29df92e3a33"),
    "numbers": ("8c82be5156a9a53c", "442aeb3b9851bfd3455cf559ae23b50269d1501844ebd03f9b707dd8ca9779b7"),
    "before_1970": ("96c9b723cfbe26a6", "38f3555d7a6e3de5ce276929f90ce6c2286b9e11468a9a9d59cbb57a66be2816"),
    "pax_sparse_files": ("fcd087a41a7ed8e3", "387549581a7c1afd481861e4a65b3fc66a6a04e01353cde265c91153a86c636b"),
    "old_sparse_files": ("9b3f6858e64cc9fc", "ba7ea3c16e77639a649b7f07fc1fd2bb5a565ad37985098485d8aaf6ccb830a7"),
    "unaligned_sparse_files": ("b529da2f9d9274f8", "cb8ef0f743ffb86328f7251aa27cda3f04fed2810d1d313d2977dce7f25c2e95"),
    "attributes": ("41af12ecddcee02d", "c3c1c12d8ad85325dd080b6a7e58a4b4ac14794c291e179a70a52f00bb773e8d"),
    "trusted": ("c44b379e0a2bdbfa", "26eceff3c7833f5770dc569dfc9f79dea46a34154e765b1d5b992d0605111dc5"),
    "overlay_xattrs": ("45c556346c2d3cf3", "96a28efcef452871d9efee55ac7d6d0e62a19793bdf340248cfff385cac948d2"),
    "empty_xattr": ("094dd09950a142bb", "1183d68897928365993d45ab3980355c52bfab4648203e910aa0e8348e2f053d"),
    "libarchive": ("b4fe33fe2bb6e006", "48bcc45aa40431de63bb99eeb03bf3dd54dd1eb86a11a01137f2203fd47c8d41"),
    "links": ("cbc2c96317ccf754", "baae12a37ca473bb28fd135dc1cd1e5e94c9e478bc23bb3dcbe53116fe15b3af"),
    "hard_links": ("7f2723e833ef2c32", "a67ac00ede9c740e85e364e3052e332422906f9f40e753ffe77f0c3eb61a3e36"),
    "link_headers": ("f67c8e3d970393e9", "92c7bbe994afbeb3dba4102e5cc8fc83af4e0c161bf273f23aafb2b27cafcf11"),
    "forward_links": ("e8f3e85291f743a6", "f6f8280c117f8b2e26ba72e428e40c7d9b49d3b818f7a2c3bcc62f3ab8ef9741"),
    "duplicates": ("9f477599772b9d3f", "2a1100e72a22b1ab8871eb4a65aa0ff9b96a8def64e2f3d769e7ac721cba39df"),
    "dir_to_link": ("4959fcd645320555", "68e935378142170835109891a4efb99d10f5417081010c2d9a8daf990d99b33f"),
    "devices": ("30b8466be344fe32", "808f4186fbb82e6a2030c44229c5022af5049b73aeb829cc586d7a32b9f8a38c"),
    "modes": ("a75ee84ea8374247", "91b0e7f1a388012d3490552ebed63b5bf1fc0ccd3b425a3dabd5e07413cab57f"),
    "borders": ("47181e58623ca75d", "73bfe6256010311f69d75e68a1252d43e9a9f18b96047854d0651495d4d29380"),
    "base": ("4f3f829313a3e001", "6fa5d09e54217cd4fe2fa2bcec7d0407b238eb8105afb9b39a3eb996d1b454eb"),
    "whiteouts": ("8e616a6ca441cb41", "72038af612c1f823266e805984b3c8b0449e01fb13811485e1d3b5fc7fffb678"),
    "remade": ("7e8f8cca8245f1eb", "f455ebecccbb65e732343f9c76987c824b0abdabd5675fe04f613b32b01e0d49"),
    "remade_late": ("4badd710c8b3b8a2", "2f599c5d5380f05c7cdc18a884eb5eb37025042d71ac5b2ed22926fa46b90a75"),
    "stray": ("2d58ca17952ded65", "f688611a52437428e4b36108258b8827d6a7e18aacaa85391f3fea2aa4a40d51"),
    "opaque_root": ("b2956326c898aea0", "37eab799786d2193ab3283d2087dbd08b56802d2c2d9fdff9a03aaa21094da60"),
    "implied": ("06bc6008e0ce2077", "7d33fd1032f76630027d722b5fbe8ad00ebbaba1194e2af3b2adb78e2f05a911"),
    "through_links": ("d44532a8dc29c4b9", "94118b70560745ad6ac2e70f7d173dad238fe2fa1a9f9a02f05be383dc3a26e4"),
    "merged_usr": ("f3805d2003589b75", "227a90127257479f15dbdc4a1d049286ccace80d87045c5480c269d3336e1317"),
    "unmerged_usr": ("9038c011dd695e73", "bb1820e71967d3e52fb77a7c894ce6def0c34bc2bc290655bdfc177b473f0e63"),
    "marks_alone": ("205f8ffd7700b7b5", "8abcfa1b53157674efdc5a13d32341c5f2d133e4d3d63ac731981cd20f9453f4"),
    "file_then_dir": ("60f96db9e924ea6a", "51320aac1108066aa50529a132a9db4e4b0acfd887434dbcdb1bcc9ea51e6bcd"),
    "trailing": ("4ae49223fc6f3022", "d0a67ba927907f01109fbe77859a60d15947b71d2c33e8653504e1780fc161f7"),
    "global_comment": ("61635485e4b7a9c2", "6b615397651307400a4b185ab4d3ecb8fd223ee8ddf5be5598f941f1e0a8e8e3"),
    "global_times": ("b384425dcf2efd31", "fb2179cfdef19ecd6788775c9f6931055fbadc1396b5d94c99f6ef0a79b41558"),
    "odd_types": ("90e2b851545e00b5", "7994b9fd4c347e5707a7f1faee9030fc68959549a88d6910f096281d49255d50"),
    "empty": ("5f70bf18a0860070", "261932109b03695a869767890944c73696b34c5e4a8d00cf11a8b7287f814600"),
    "nothing": ("e3b0c44298fc1c14", "099c53a7501845f091a750dda6a50eeca5b3f7ed3be38c2dd2020bf7251ed931"),
    "every_kind": ("ee3e1852c5ec238b", "546031052ae975a7112933e421c8a1524def09927f319601e92d01bdfa8e0b79"),
    "many": ("d976c97e20e73540", "56c797eba9a764d7ac3ab49cfe23bf2f74a7fb7571e3e9f7f4bfc90a060ef263"),
    "sources": ("b316a576bc56e49c", "3e0c09e5fb730b48e7014c314010715a291b1231435329f06e042b704f285e51"),
}
# Turns all tars of a directory into layer files beside them.
_CONVERT_ALL = """
import sys
from pathlib import Path
from afs.layerstore.afslyr.convert import convert
for tar in sorted(Path(sys.argv[1]).glob("*.tar")):
    with tar.open("rb") as file:
        convert(file.read, tar.with_suffix(".afslyr"))
"""


@pytest.mark.parametrize("kind", [*KINDS, "sources", pytest.param("many", marks=pytest.mark.slow)])
def test_the_file_is_the_same_in_all_versions_of_the_code(kind: str, tmp_path: Path) -> None:
    tar = {**KINDS, **LARGE}[kind]()
    fixture, root_digest = GOLDEN[kind]
    assert hashlib.sha256(tar).hexdigest()[:16] == fixture, "the fixture changed, not the converter"
    assert convert_bytes(tar, tmp_path / "layer").root_digest == f"sha256:{root_digest}"


@pytest.mark.parametrize("kind", KINDS)
def test_all_encodings_give_one_file(kind: str, tmp_path: Path) -> None:
    tar = KINDS[kind]()
    convert_bytes(tar, tmp_path / "wanted")
    wanted = (tmp_path / "wanted").read_bytes()
    for name, blob in encodings.encodings(tar).items():
        made = convert_bytes(blob, tmp_path / name)
        assert (tmp_path / name).read_bytes() == wanted, name
        assert made.blob_digest == f"sha256:{hashlib.sha256(blob).hexdigest()}", name


def test_all_processes_make_one_file(tmp_path: Path) -> None:
    """Other hash seeds, locales, time zones and umasks change nothing, and neither does time passing."""
    for seed, zone in (("0", "UTC"), ("1", "Asia/Kolkata"), ("4294967295", "America/Caracas")):
        directory = tmp_path / seed
        directory.mkdir()
        for kind, make in KINDS.items():
            (directory / f"{kind}.tar").write_bytes(make())
        changed = {"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C" if seed == "0" else "C.UTF-8"}
        argv: list[str | Path] = [sys.executable, "-c", _CONVERT_ALL, directory]
        subprocess.run(argv, check=True, env=os.environ | changed, umask=0o077 if seed == "1" else 0o022)
    for kind in KINDS:
        files = {(tmp_path / seed / f"{kind}.afslyr").read_bytes() for seed in ("0", "1", "4294967295")}
        assert len(files) == 1, kind
