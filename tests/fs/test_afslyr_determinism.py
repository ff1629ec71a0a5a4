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
    "names": ("7c7a342ae3a0f30a", "739f393e23ef9d1bd442a6fadf7ea69918f8ab2764b4fd1515f54c636eb21637"),
    "numbers": ("8c82be5156a9a53c", "2e80c5784473df1dc366e352017fabdcbf6471513f51e21ca3b91688da4c3654"),
    "before_1970": ("96c9b723cfbe26a6", "eb289cedba808adb9b9c7eecfe5e61c0e047658f60140aad976c936d8eb61f03"),
    "pax_sparse_files": ("fcd087a41a7ed8e3", "7494ce6a345dc628db17617f14d0c813c429ddff5cd76fce57ecb3c1cf7c061e"),
    "old_sparse_files": ("9b3f6858e64cc9fc", "e3680fd657478770b127d83d2d7599c281b0f8888bca85e4e6ff2362ee1152c2"),
    "unaligned_sparse_files": ("b529da2f9d9274f8", "43e8c492b88fd2f14d605a4e5d412ecf55c3571f26cb62950367879a20fd39a8"),
    "attributes": ("41af12ecddcee02d", "daaec52c20c2d019ee08dba84aa49d2ccb52bf87bc81919e154fe5f1cd28d6bf"),
    "trusted": ("c44b379e0a2bdbfa", "3c08624a4fe5f15a2a5546b93723cf04c39957ec0cfe420fe5d59ab8b1abfe56"),
    "overlay_xattrs": ("45c556346c2d3cf3", "18bf38ab6071f4ae9f5883d24da40f835dc8d57e2411b1568b6b643109afc8a7"),
    "empty_xattr": ("094dd09950a142bb", "520c4320e4e383399bef96dcf9d3472e9cb6d4e94b82ad36ddfa585f418084c8"),
    "libarchive": ("b4fe33fe2bb6e006", "8620aced79c00e96e1d1da19edd45b2b98fd4f31c707b23644f69dd1760ee4e7"),
    "links": ("cbc2c96317ccf754", "9926a158fa689a628147b06f94f6aefaff0494dfc9a3e86d7e3bc7b2f6eb35ba"),
    "hard_links": ("7f2723e833ef2c32", "15e9edea58b4f3dffff44eb74f8622391535af22127c79b22db96c4739b351f7"),
    "link_headers": ("f67c8e3d970393e9", "d6735d146ef7f73500a195f7a91dfdb9c77fd4b8a8c19c74304bee326ceb12c5"),
    "forward_links": ("e8f3e85291f743a6", "100308462c6c9f9bf948ef890296a64b9462d2b531d103d9b5cd10072e26d5f1"),
    "duplicates": ("9f477599772b9d3f", "85289ac9aafc54c4792be62ab3ecd2bb1044e42a3d8eca5344405be9e283d81b"),
    "dir_to_link": ("4959fcd645320555", "e8151a5dc33679a37d71bf949fb930e375211425570938135e12cb2c5e9cb323"),
    "devices": ("30b8466be344fe32", "2aa9072e960ccba20d599b842f6e75cdd4ccaaee6dfedf86a09eb42db8f929a7"),
    "modes": ("a75ee84ea8374247", "22b9577681102a31a0dff781998022375d3716a1bbc0b1e6615318e4fb311f1f"),
    "borders": ("47181e58623ca75d", "86f7f2e06a8abc9d70f98a2896fefb137362b0112b36f65ab54593873fb01d06"),
    "base": ("4f3f829313a3e001", "a02c824e8587c8ed5af93f82361063801cad79f126378902a33a981f867faae7"),
    "whiteouts": ("8e616a6ca441cb41", "e53b9961861b1f5652ae6bd8fee5256044f1dbefde734606fe4431c06551b063"),
    "remade": ("7e8f8cca8245f1eb", "584f9c8be70046a94392c27f32815e363b9e50ddc13e45692723faa925ee1edf"),
    "remade_late": ("4badd710c8b3b8a2", "49dc78e803c133879c377dca7f1451bd8236ae682c8cc35b4a919117ad981f30"),
    "stray": ("2d58ca17952ded65", "da8875669151ae1f463712136172241695f1ecfc9a08779e9cedb9b3e308e812"),
    "opaque_root": ("b2956326c898aea0", "d273441d2881d70624acef40be689db772144f8fa5af86b502d4b9fb354afeaa"),
    "implied": ("06bc6008e0ce2077", "505e41fbfa3ff3e9a4190b97e1bdf2cec9a83552f841905e8b143bc76468d81b"),
    "through_links": ("d44532a8dc29c4b9", "902e7d450fa2816e5294fe2aebcecef2f8a416bc0bb9819c27f27b0dcd51cb8c"),
    "merged_usr": ("f3805d2003589b75", "1503b4df58deb4453c75e94d86802255740b4683c06cd1cb78def0c2d6293a18"),
    "unmerged_usr": ("9038c011dd695e73", "a9fe36ba6e46f31c4ce1e1fbdbc40411987dc02094fcb5cd59700621c3388566"),
    "marks_alone": ("205f8ffd7700b7b5", "439f5127669b072c1b73d2ba272b3032592ddfa50c18824e6b72da5a53c1db69"),
    "file_then_dir": ("60f96db9e924ea6a", "5a8ee054ab1e5dda67e7cdc9e7c0f9174f1d9192b4912f85556e20530d841bb9"),
    "trailing": ("4ae49223fc6f3022", "b9723d07f9e0ddea66b46a25b5428a8c646fe0fbf9cf419732810266297c153d"),
    "global_comment": ("61635485e4b7a9c2", "07bd081f2a4eca47748529020afdf2ac1486ae17abd3faac333beda869642932"),
    "global_times": ("b384425dcf2efd31", "023cb52fb592113210fabe52d9858e23c70353b9c3022ea51d278c9dbfe52a92"),
    "odd_types": ("90e2b851545e00b5", "a3a2f9efb6c3013425fa2661ce3467e60c279ad5ffe1d999e906227a750ca114"),
    "empty": ("5f70bf18a0860070", "887714a2c4dc5ad542a2a69b0a228647db7737fec30f3808b152b68d99b4864e"),
    "nothing": ("e3b0c44298fc1c14", "ab9f01c53c7ecf32d22465399e62e1d09be87b226c3723698be46a3e1fcc358c"),
    "every_kind": ("ee3e1852c5ec238b", "4decccc060fad1d11117a1b9e23a95c834d7683cbd34a566f3d09de6ae8cb901"),
    "many": ("d976c97e20e73540", "a298f553c23345d0d3e9c28e7cc2a1b62b90bdd4b93ef3acdf8739ef0d9bf1f8"),
    "sources": ("b316a576bc56e49c", "6df1463876cf30408a3bc34918addf52f02bab799f95a414a9a34bce8afd0f25"),
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
