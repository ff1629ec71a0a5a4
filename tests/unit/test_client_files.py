"""The client's parts that need no cluster: uploads, events, files written whole, and the command line's helpers."""

import os
import socket
from pathlib import Path

import pytest

from afs.client.cli_arguments import environment, image_name, labels, platform, split_dir, split_file
from afs.client.collecting import written_whole
from afs.client.events import Accepted, DiffChunk, DiffStart, Done, Finished, Log, Outcome, RunResult
from afs.client.files import Source, upload_messages
from afs.client.uploads import Upload
from afs.client.wire import event_of, to_json
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb


def uploaded(directory: Path, prefix: str = "") -> list[tuple[str, str, bytes]]:
    """(path, what, data) of every entry; each has to begin and to end."""
    found: list[tuple[str, str, bytes]] = []
    open_entry: pb.FileEntryBegin | None = None
    data = b""
    for message in upload_messages(directory, prefix):
        match message.WhichOneof("payload"):
            case "file_begin":
                assert open_entry is None
                open_entry, data = message.file_begin, b""
            case "file_chunk":
                assert 0 < len(message.file_chunk.data) <= 1 << 20
                data += message.file_chunk.data
            case kind:
                assert kind == "file_end"
                assert open_entry is not None
                what = pb.FileType.Name(open_entry.type).removeprefix("FILE_TYPE_")
                found.append((open_entry.path, what, data or open_entry.symlink_target.encode()))
                open_entry = None
    assert open_entry is None
    return found


def test_an_upload_holds_files_directories_and_links(tmp_path: Path) -> None:
    (tmp_path / "b" / "empty").mkdir(parents=True)
    (tmp_path / "b" / "file").write_bytes(b"x" * 2_500_000)
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "dangling").symlink_to("/nowhere")
    assert uploaded(tmp_path) == [
        ("a", "FILE", b""),
        ("b", "DIR", b""),
        ("b/empty", "DIR", b""),
        ("b/file", "FILE", b"x" * 2_500_000),
        ("dangling", "SYMLINK", b"/nowhere"),
        ("link", "SYMLINK", b"b"),
    ]


@pytest.mark.parametrize(("prefix", "path"), [("", "f"), ("/", "f"), ("/opt/x/", "opt/x/f"), ("opt", "opt/f")])
def test_a_prefix_is_below_the_root(tmp_path: Path, prefix: str, path: str) -> None:
    (tmp_path / "f").touch()
    assert [entry[0] for entry in uploaded(tmp_path, prefix)] == [path]


def test_modes_and_times_are_kept_and_owners_are_not(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "f").chmod(0o4755)
    os.utime(tmp_path / "f", (7, 7))
    begin = next(upload_messages(tmp_path)).file_begin
    assert (begin.mode, begin.mtime_unix, begin.uid, begin.gid) == (0o4755, 7, 0, 0)


def test_what_an_upload_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"^cannot upload {tmp_path}/none: neither a directory nor a file$"):
        uploaded(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgument, match=f"^cannot upload {tmp_path}/fifo: neither file, directory nor symlink$"):
        uploaded(tmp_path)
    (tmp_path / "fifo").unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "sock"))
        with pytest.raises(InvalidArgument, match="/sock: neither file"):
            uploaded(tmp_path)


def test_several_sources_and_patterns(tmp_path: Path) -> None:
    for name in ("src/a.py", "src/.git/config", "src/build/x", "src/sub/build/y", "src/sub/b.log", "one"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    sources: list[Source] = [(tmp_path / "src", "/work"), (str(tmp_path / "one"), "/etc/x/"), (tmp_path / "one", "")]
    messages = upload_messages(sources, exclude=[".git/", "/build", "*.log"])
    begins = [message.file_begin.path for message in messages if message.HasField("file_begin")]
    assert begins == ["work/a.py", "work/sub", "work/sub/build", "work/sub/build/y", "etc/x/one", "one"]
    with pytest.raises(InvalidArgument, match=r"^exclude '\[a' has a \[ without \]$"):
        upload_messages(tmp_path, exclude=["[a"])


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    messages = upload_messages(tmp_path)
    next(messages)
    (tmp_path / "b").unlink()
    with pytest.raises(InvalidArgument, match=f"^cannot upload {tmp_path}/b: No such file or directory$"):
        list(messages)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with written_whole(path) as file:
        file.out.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(KeyError), written_whole(path) as file:
        file.out.write(b"second")
        raise KeyError
    with written_whole(path) as file:
        file.out.write(b"third")
        file.wanted = False
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "no" / "out"):
        pass


def test_events() -> None:
    result = pb.Result(
        exit_code=137, error="why", outcome=pb.OUTCOME_OUT_OF_MEMORY, peak_memory_bytes=5, cpu_time_us=1_500_000,
        timings=pb.Timings(image_us=2_000_000, run_us=1),
    )  # fmt: skip
    finished = Finished(137, Outcome.OUT_OF_MEMORY, "why", 0, 5, 1.5, {"image": 2.0, "run": 1e-6})
    for response, event in (
        (pb.ExecuteResponse(accepted=pb.Accepted(accepted=True, node_id="n")), Accepted("n")),
        (
            pb.ExecuteResponse(log=pb.LogMessage(source="stdout", message="\ufffd", data=b"\xff")),
            Log("stdout", b"\xff"),
        ),
        (pb.ExecuteResponse(result=result), finished),
        (pb.ExecuteResponse(tar_header=pb.TarHeader(name="x")), DiffStart("x")),
        (pb.ExecuteResponse(tar_chunk=pb.TarChunk(data=b"x")), DiffChunk(b"x")),
        (pb.ExecuteResponse(done=pb.Done()), Done()),
        (pb.ExecuteResponse(), None),
    ):
        assert event_of(response) == event


def test_events_of_an_old_server() -> None:
    log = pb.ExecuteResponse(log=pb.LogMessage(source="stderr", message="ü"))
    assert event_of(log) == Log("stderr", "ü".encode())
    assert event_of(pb.ExecuteResponse(result=pb.Result(exit_code=3))) == Finished(3, Outcome.UNKNOWN, "")


def test_every_outcome_has_a_name() -> None:
    for name, number in pb.Outcome.items():
        event = event_of(pb.ExecuteResponse(result=pb.Result(outcome=number)))
        assert isinstance(event, Finished)
        assert (event.outcome is Outcome.UNKNOWN) == (name == "OUTCOME_UNSPECIFIED")


def test_a_result_is_ok_only_after_an_exit_with_0() -> None:
    def result(code: int, outcome: Outcome) -> RunResult:
        return RunResult("n", code, outcome, "", b"\xff", b"", None, 1, 2.0, {})

    assert result(0, Outcome.EXITED).ok
    assert not result(1, Outcome.EXITED).ok
    assert not result(0, Outcome.UNKNOWN).ok
    assert '"stdout": "\\ufffd"' in to_json(result(0, Outcome.EXITED))


def test_directories_and_prefixes(tmp_path: Path) -> None:
    odd = tmp_path / "a:"
    (odd / "b").mkdir(parents=True)
    assert split_dir("d") == Upload(Path("d"), "/")
    assert split_dir("d:/opt/x") == Upload(Path("d"), "/opt/x")
    assert split_dir("d:relative") == Upload(Path("d:relative"), "/")
    assert split_dir(f"{odd}/b") == Upload(odd / "b", "/")


def test_files_and_their_places(tmp_path: Path) -> None:
    file = tmp_path / "a:"
    file.mkdir()
    file /= "f"
    file.touch()
    assert split_file(f"{file}") == Upload(file, "/f")
    assert split_file(f"{file}:/opt/x") == Upload(file, "/opt/x")
    assert split_file(f"{file}:/opt/") == Upload(file, "/opt/f")
    for wrong in (f"{file}:opt", f"{tmp_path}:/opt", f"{tmp_path}/none"):
        with pytest.raises(InvalidArgument, match=r": not a file$"):
            split_file(wrong)


def test_labels_and_platforms() -> None:
    assert labels(("a=b=c", "d=")) == {"a": "b=c", "d": ""}
    for wrong in ("a", "=b"):
        with pytest.raises(InvalidArgument, match=f"^--label '{wrong}' is not KEY=value$"):
            labels((wrong,))
    assert platform("linux/arm64/v8") == ("linux", "arm64", "v8")
    assert platform("") == ("", "", "")


def test_local_images_get_absolute_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    assert image_name("alpine:3.20") == "alpine:3.20"
    assert image_name("oci:/abs:v1") == "oci:/abs:v1"
    assert image_name("oci:dir:v1") == f"oci:{tmp_path}/dir:v1"
    assert image_name("oci:./dir") == f"oci:{tmp_path}/dir"
    assert image_name("docker-archive:sub/x.tar") == f"docker-archive:{tmp_path}/sub/x.tar"


def test_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSED", "on")
    monkeypatch.delenv("ABSENT", raising=False)
    assert environment(("A=1", "B=", "C=x=y", "PASSED")) == {"A": "1", "B": "", "C": "x=y", "PASSED": "on"}
    for bad in ("ABSENT", "", "=x"):
        with pytest.raises(InvalidArgument, match=f"^--env '{bad}' is not NAME=value$"):
            environment((bad,))
