"""The push against a hub on this machine: everything in one private commit, and each failure as one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.published_run import QWEN, write_run
from tests.stub_hub import TOKEN, Repository, StubHub

ROOT = Path(__file__).resolve().parents[1]
NAME = "someone/psysafe-small"


@pytest.fixture(scope="module")
def hub():
    with StubHub() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory) -> dict[str, str]:
    home = str(tmp_path_factory.mktemp("home"))
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": home, "HOME": home, "HF_TOKEN": TOKEN}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def process(environment):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.publish_process"], cwd=ROOT, env=environment, **pipes
    ) as started:
        yield started
        started.stdin.close()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small", QWEN, multimodal=True)


@pytest.fixture
def publish(process, hub, finished_run, tmp_path):
    """The command, which gives (exit code, output, errors). The hub is empty before each test."""
    hub.reset()
    (finished_run / "README.md").unlink(missing_ok=True)

    def call(*words: str, **variables: str) -> tuple[int, str, str]:
        argv = [str(finished_run), "--repo", NAME, *words]
        command = {"argv": argv, "environment": variables, "output": str(tmp_path / "said")}
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        out, err = ((tmp_path / f"said.{stream}").read_text() for stream in ("out", "err"))
        assert TOKEN not in out + err and str(finished_run.parent) not in out + err
        return code, out, err

    return call


def refusal(publish, *words: str) -> str:
    """The one line that a push ends in -> that line."""
    code, _, err = publish(*words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def files_of(hub: StubHub) -> dict[str, bytes]:
    return hub.repositories[NAME].files


def test_a_push_is_one_commit_in_a_private_repository(publish, hub, finished_run):
    code, out, err = publish()
    assert (code, err) == (0, "") and out.endswith(f"published: {hub.url}/{NAME}\n")
    repository = hub.repositories[NAME]
    assert repository.private and len(repository.commits) == 2
    assert repository.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert repository.files["adapter_model.safetensors"] == (finished_run / "adapter_model.safetensors").read_bytes()
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == QWEN
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.base_model == QWEN and (finished_run / "README.md").read_text() == card.content
    sent = [one for one in hub.seen if not one.startswith("GET")]
    kinds = [next(word for word in ("create", "validate", "preupload", "batch", "objects", "commit") if word in one)
             for one in sent]  # fmt: skip
    assert kinds == ["create", "validate", "preupload", "batch", "objects", "commit"]


def test_public_comes_last(publish, hub):
    code, out, _ = publish("--public")
    assert code == 0 and f"{NAME}, public:" in out
    assert hub.visibility == [True] and not hub.repositories[NAME].private
    assert hub.seen[-1].endswith("/settings") and "/commit/" in hub.seen[-2]
    assert publish("--public", "--license", "mit")[0] == 0 and hub.visibility == [True, False]
    code, _, err = publish()  # what is public already is not written to by a command that says private
    assert code == 2 and "is public on the hub; give --public" in err


def test_a_second_push_sends_only_what_changed(publish, hub, finished_run):
    publish()
    seen = len(hub.seen)
    code, _, err = publish()
    assert (code, err) == (0, f"{NAME}: every file was there already\n")
    assert len(hub.repositories[NAME].commits) == 2 and not any(
        one.startswith("PUT /objects") for one in hub.seen[seen:]
    )
    assert publish("--license", "mit")[0] == 0 and len(hub.repositories[NAME].commits) == 3


@pytest.mark.parametrize(
    ("method", "part", "status", "expected"),
    [
        ("POST", "/repos/create", 401, "does not know this token (401); run `hf auth login`"),
        ("POST", "/repos/create", 403, f"may not write to {NAME} (403)"),
        ("POST", "/preupload", 404, "has no someone, or this token may not see it (404)"),
        ("POST", "/commit", 403, f"may not write to {NAME} (403)"),
        ("POST", "/commit", 409, f"somebody else changed {NAME} at the same time (409)"),
        ("POST", "/commit", 500, "status 500"),
        ("POST", "/batch", 503, "status 503"),
        ("PUT", "/objects", 500, "status 500"),
        ("PUT", "/objects", "drop", "the connection to the hub failed"),
        ("POST", "/commit", "drop", "the connection to the hub failed"),
        ("POST", "/preupload", 429, "too many requests (429)"),
    ],
)
def test_a_failure_is_one_line_and_the_same_command_continues(method, part, status, expected, publish, hub):
    hub.fail(method, part, status)
    line = refusal(publish, "--public")
    assert expected in line and line.endswith("The same command continues\n")
    is_there = NAME in hub.repositories
    state = f"{NAME} is there, private, without these files" if is_there else "nothing was changed on the hub"
    assert state in line
    if is_there:
        assert hub.repositories[NAME].private and not files_of(hub)
    hub.faults.clear()
    sent_before = len(hub.objects)
    code, out, _ = publish("--public")
    assert code == 0 and "published: " in out and not hub.repositories[NAME].private and files_of(hub)
    if part == "/commit":  # the weights had arrived before, and were not sent again
        assert sent_before == 1 and sum(one.startswith("PUT /objects/") for one in hub.seen) == 1


def test_a_failure_that_passes_is_no_error(publish, hub):
    hub.fail("PUT", "/objects", "drop", times=1)
    code, _, err = publish()
    assert code == 0 and err == "" and len(hub.objects) == 1


def test_a_token_that_is_missing_or_wrong(publish, hub):
    code, _, err = publish(HF_TOKEN="")
    assert code == 2 and "no token for the hub; run `hf auth login`" in err and hub.seen == []
    code, _, err = publish(HF_TOKEN="hf_wrongwrongwrongwrong")
    assert code == 2 and "does not know this token (401)" in err and "hf_wrong" not in err


def test_a_repository_that_could_not_be_made_public_says_what_is_there(publish, hub):
    hub.fail("PUT", "/settings", 403)
    assert f"all files are in {NAME}, which is private" in refusal(publish, "--public")
    assert hub.repositories[NAME].private and files_of(hub)
    hub.faults.clear()
    assert publish("--public")[0] == 0 and not hub.repositories[NAME].private


def test_somebody_elses_commit_in_between_is_not_written_over(publish, hub):
    publish()
    hub.fail("POST", "/preupload", "race", times=1)
    line = refusal(publish, "--license", "mit")
    assert "somebody else changed" in line and "(412)" in line and f"{NAME} is as it was" in line
    assert files_of(hub)["notes.txt"] == b"from somebody else"
    assert publish("--license", "mit")[0] == 0 and "notes.txt" in files_of(hub)


def test_a_card_that_was_edited_on_the_hub_is_kept(publish, hub):
    publish()
    edited = files_of(hub)["README.md"].replace(b"# psysafe-small", b"# Our own title")
    hub.repositories[NAME].commit({"README.md": edited})
    line = refusal(publish, "--license", "mit")
    assert "README.md was edited on the hub" in line and "--edited-card replace" in line
    assert len(hub.repositories[NAME].commits) == 3 and files_of(hub)["README.md"] == edited
    code, _, err = publish("--license", "mit", "--edited-card", "keep")
    assert code == 0 and "stays as it is there" in err and files_of(hub)["README.md"] == edited
    assert publish("--license", "mit", "--edited-card", "replace")[0] == 0
    assert b"license: mit" in files_of(hub)["README.md"]


def test_a_card_of_other_origin_is_not_ours_to_replace(publish, hub):
    hub.repositories[NAME] = Repository(private=True, files={"README.md": b"Written by hand.\n"})
    assert "README.md was edited on the hub" in refusal(publish)


def test_what_an_earlier_push_left_cannot_mislead_a_loader(publish, hub, tmp_path):
    """An adapter_config.json beside merged weights would make transformers add the adapter a second time."""
    publish()
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    code, _, err = publish("--merged", str(merged))
    assert code == 0 and err.count("removed from the newest commit") == 2
    assert files_of(hub).keys() == {"README.md", "config.json", "model.safetensors", "adapter/adapter_config.json",
                                    "adapter/adapter_model.safetensors"}  # fmt: skip
    assert "holds a merged model of an earlier push" in refusal(publish)
    hub.repositories[NAME] = Repository(private=True, files={"old.gguf": b"GGUF"})
    assert "holds old.gguf of an earlier push; give --gguf" in refusal(publish)


LEFT = "on the hub, not part of this push, left as it is: "


def test_what_an_earlier_push_included_is_named_and_left(publish, hub):
    assert publish("--include", "metrics")[::2] == (0, "")
    repository = hub.repositories[NAME]
    repository.commit({".gitattributes": b"", "notes/mine.txt": b"somebody's own"})
    expected = f"{LEFT}metrics.jsonl\n{LEFT}notes/mine.txt\n"
    seen = len(hub.seen)
    code, out, err = publish("--dry-run")
    assert (code, err) == (0, f"{expected}dry run: nothing was sent or written\n") and "metrics.jsonl" not in out
    assert {one.partition(" ")[0] for one in hub.seen[seen:]} == {"GET"} and len(repository.commits) == 3
    code, _, err = publish("--license", "mit")
    assert (code, err) == (0, expected)
    assert files_of(hub)["notes/mine.txt"] == b"somebody's own" and files_of(hub)["metrics.jsonl"]
    assert publish("--license", "mit")[2] == f"{NAME}: every file was there already\n{expected}"
    repository.commit({"metrics.jsonl": None, "notes/mine.txt": None} | {f"checkpoint-{n:02}": b"" for n in range(22)})
    left = publish("--dry-run")[2].splitlines()
    assert left[19:] == [f"{LEFT}checkpoint-19", "on the hub, not part of this push, left as they are: 2 more",
                         "dry run: nothing was sent or written"]  # fmt: skip


def test_a_card_that_is_kept_is_part_of_the_push(publish, hub):
    publish()
    hub.repositories[NAME].commit({"README.md": b"Our own.\n"})
    assert publish("--edited-card", "keep")[2].count(LEFT) == 0


def test_the_dry_run_says_what_the_push_would_do_or_be_refused_for(publish, hub, tmp_path):
    assert f"{NAME} is not on the hub yet" in publish("--dry-run")[2] and NAME not in hub.repositories
    publish()
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    err = publish("--merged", str(merged), "--dry-run")[2]
    removed = "would be removed from the newest commit, of an earlier push: adapter_"
    assert f"{removed}config.json\n{removed}model.safetensors\n" in err and LEFT not in err
    hub.repositories[NAME] = Repository(private=True, files={"config.json": b"{}"})
    assert "holds a merged model of an earlier push" in refusal(publish, "--dry-run")
    hub.repositories[NAME] = Repository(private=False, files={})
    assert "is public on the hub; give --public" in refusal(publish, "--dry-run")


@pytest.mark.parametrize(("what", "reason"), [(401, "(401)"), (500, "status 500"), ("drop", "connection to the hub")])
def test_a_dry_run_needs_no_hub(what, reason, publish, hub):
    hub.fail("GET", "/models/", what)
    code, out, err = publish("--dry-run")
    assert code == 0 and "# psysafe-small" in out
    assert err.startswith("what is on the hub already is not known: ") and reason in err and err.count("\n") == 2
    code, _, err = publish("--dry-run", HF_TOKEN="")
    assert code == 0 and err.startswith("no token for the hub, so it was not asked") and err.count("\n") == 2


def test_metadata_that_the_hub_refuses(publish, hub):
    line = refusal(publish, "--license", "nonsense")
    assert '"license" must be known' in line and not files_of(hub)
    code, _, err = publish("--license", "rare")
    assert (code, err) == (0, 'Warnings while validating metadata in README.md: - "license" is rare\n')


@pytest.mark.parametrize("n_files", [1, 2])  # several are sent by threads, which would finish their files first
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_what_is_there(number, code, n_files, hub, environment, finished_run, tmp_path):
    hub.reset()
    hub.fail("PUT", "/objects", "hang")
    command = [sys.executable, "-m", "psysafe.publish", str(finished_run), "--repo", NAME]
    if n_files == 2:
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(1000))
        command += ["--gguf", str(tmp_path / "model.gguf")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    assert hub.putting.wait(300)
    child.send_signal(number)
    out, err = child.communicate(timeout=300)  # the hub would hold the upload for longer
    assert child.returncode == code and f"{NAME}, private:" in out
    assert err == f"stopped; {NAME} is there, private, without these files. The same command continues\n"
