"""Jobs: several at a time, stopped together, gone on with from checkpoints of the same run."""

import shutil

import pytest
from benchmark_cases import commit

from peft_talora.benchmark.jobs import Job, run_jobs

SCRIPT = """
import json, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--output_dir"])
if flags["--end"] == "wait":
    time.sleep(60)
if flags["--end"] == "diverge":
    raise FloatingPointError("the loss")
if flags["--end"] == "fail":
    raise ValueError("no such thing")
(folder / "results.json").write_text(json.dumps({"flags": flags}))
"""


@pytest.fixture
def make_job(tmp_path):
    script = tmp_path / "clone" / "recipes" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)

    def make(name, end="well", others=None, context=None, anew=False, **arguments):
        return Job(
            name,
            script,
            {"end": end, **arguments},
            others or {},
            tmp_path / name,
            context=context or {},
            accepted_error="FloatingPointError",
            anew=anew,
        )

    return make


def test_all_run_and_leave_results_until_they_are_discarded(make_job):
    jobs = [make_job(name, seed=seed) for seed, name in enumerate("abc")]
    seeds = set()
    for job in run_jobs(jobs, 2):
        seeds.add(job.results()["flags"]["--seed"])
        job.discard()
        assert not job.folder.exists()
    assert seeds == {"0", "1", "2"}


def test_a_failure_shows_its_end_and_ends_the_others(make_job):
    with pytest.raises(RuntimeError, match=r"(?s)bad failed with exit code 1.*ValueError: no such thing"):
        list(run_jobs([make_job("slow", "wait"), make_job("bad", "fail"), make_job("never")], 2))
    assert not make_job("never").folder.exists()


def test_an_accepted_error_is_an_outcome(make_job):
    (job,) = run_jobs([make_job("high", "diverge")], 1)
    assert job.failed_acceptably()
    (job,) = run_jobs([make_job("low")], 1)
    assert not job.failed_acceptably()


def test_flags_say_what_the_arguments_are(make_job):
    job = make_job("a", tasks=["depth=1"] * 2, base=None, augment=False, others={"num_threads": 2})
    command = " ".join(job.command())
    assert "--end well --tasks depth=1 depth=1 --augment False --num_threads 2 --output_dir" in command
    assert "--base" not in command


@pytest.fixture
def goes_on(tmp_path):
    """Whether a job, started in a folder with a checkpoint, goes on from it; the folder then has one again."""

    def start(job):
        checkpoint = job.folder / "depth" / "checkpoint-3"  # of one of several tasks that are trained apart
        assert job.start().wait() == 0
        resumed = "--resume_from_checkpoint" in job.results()["flags"]
        assert checkpoint.exists() == resumed, "what another run left is deleted"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.json").write_text("{}")
        return resumed

    return start


def test_a_checkpoint_of_the_same_run_is_gone_on_with(make_job, goes_on, tmp_path):
    context = {"base_weights": "abc"}
    assert [goes_on(make_job("a", seed=0, context=context)) for _ in range(2)] == [False, True]
    assert goes_on(make_job("a", seed=0, context=context, others={"num_threads": 2}))
    assert not goes_on(make_job("a", seed=1, context=context))
    assert not goes_on(make_job("a", seed=1, context={"base_weights": "other"}))
    assert not goes_on(make_job("a", seed=1, context={"base_weights": "other"}, anew=True))
    assert goes_on(make_job("a", seed=1, context={"base_weights": "other"}))
    (tmp_path / "clone" / "recipes" / "another.py").write_text("")
    assert not goes_on(make_job("a", seed=1, context={"base_weights": "other"})), "a run is of one code"


@pytest.mark.skipif(shutil.which("git") is None, reason="git makes the commits")
def test_a_run_s_commit_is_that_of_its_start(make_job, goes_on, tmp_path):
    job = make_job("a", seed=0)
    commit(tmp_path / "clone")
    goes_on(job)
    first = job.commit
    commit(tmp_path / "clone")
    assert goes_on(job), "the code is the same"
    assert job.commit == first


def test_a_process_imports_the_package_of_its_own_clone(make_job, tmp_path):
    job = make_job("a")
    package = tmp_path / "clone" / "peft_talora"
    package.mkdir()
    (package / "__init__.py").write_text("")
    job.script.write_text("import peft_talora; print(peft_talora.__file__)")
    assert job.start().wait() == 0
    assert job.log.read_text().strip() == str(package / "__init__.py")


def test_a_folder_in_which_a_process_works_is_left_alone(make_job):
    process = make_job("a", "wait").start()
    with pytest.raises(RuntimeError, match=r"a process works in .* already"):
        make_job("a", "well").start()
    assert make_job("a").log.exists()
    process.kill()
    process.wait()
    assert make_job("a").start().wait() == 0


def test_workers_are_at_least_one(make_job):
    with pytest.raises(ValueError, match="`workers` is 0"):
        list(run_jobs([make_job("a")], 0))
