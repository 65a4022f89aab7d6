"""Launchers: what they would run, what they refuse, and several local processes for real."""

import os
import pathlib
import subprocess
import sysconfig

import kubernetes_validate
import pytest
import yaml

from luthier.training.signals import EXIT_PREEMPTED

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
TRAIN = ("--", "luthier", "train", "--config=it's.py", "--config.stages[0].steps=3")
TPU = {"TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16", "TPU_IMAGE": "v2-alpha-tpuv5-lite"}
GKE = {"GKE_IMAGE": "docker.pkg.dev/p/luthier:1", "GKE_ACCELERATOR": "tpu-v5-lite-podslice", "GKE_TOPOLOGY": "4x4"}


def launch(script, *words, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TPU_", "GKE_", "SLURM_"))}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], env=clean | environment, capture_output=True, text=True, timeout=300
    )


def test_shellcheck_finds_nothing():
    scripts = [str(path) for path in [*LAUNCH.glob("*.sh"), LAUNCH.parent / "tests" / "run.sh"]]
    shellcheck = os.path.join(sysconfig.get_path("scripts"), "shellcheck")
    found = subprocess.run([shellcheck, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "script, words, environment, said",
    [
        ("tpu_vm.sh", ("run", *TRAIN), {**TPU, "TPU_ZONE": ""}, "set TPU_ZONE"),
        ("tpu_vm.sh", ("run", *TRAIN), {**TPU, "TPU_TYPE": ""}, "set TPU_TYPE"),
        ("tpu_vm.sh", ("run", *TRAIN), {**TPU, "TPU_IMAGE": ""}, "set TPU_IMAGE"),
        ("tpu_vm.sh", ("Run!", *TRAIN), TPU, "NAME must be"),
        ("tpu_vm.sh", ("run",), TPU, "after NAME --"),
        ("gke.sh", ("run", "2", *TRAIN), {**GKE, "GKE_IMAGE": ""}, "set GKE_IMAGE"),
        ("gke.sh", ("run", "2", *TRAIN), {**GKE, "GKE_ACCELERATOR": ""}, "set GKE_ACCELERATOR"),
        ("gke.sh", ("run", "2", *TRAIN), {**GKE, "GKE_TOPOLOGY": ""}, "set GKE_TOPOLOGY"),
        ("gke.sh", ("run", "two", *TRAIN), GKE, "HOSTS must be"),
        ("gke.sh", ("run", "2", *TRAIN), {**GKE, "GKE_SLICES": "two"}, "GKE_SLICES must be"),
        ("slurm.sh", TRAIN[1:], {}, "start it with sbatch"),
        ("slurm.sh", (), {}, "give the command"),
        ("local.sh", ("none", *TRAIN), {}, "PROCESSES must be"),
        ("local.sh", ("2", "luthier"), {}, "after --"),
    ],
)
def test_nothing_starts_without_what_it_needs(script, words, environment, said):
    done = launch(script, *words, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.startswith(f"launch/{script}: error: ") and done.stderr.count("\n") == 1


def test_dry_runs_show_every_command():
    shown = launch("tpu_vm.sh", "--dry_run", "run", *TRAIN, **TPU).stdout
    assert "queued-resources create run --node-id=run --zone=us-west4-a --accelerator-type=v5litepod-16" in shown
    assert shown.count("--worker=all") == 2 and "luthier\\ train" in shown
    assert launch("slurm.sh", "--dry_run", *TRAIN[1:]).stdout.startswith("srun --kill-on-bad-exit=0 luthier train")
    lines = launch("local.sh", "--dry_run", "2", "4", *TRAIN).stdout.splitlines()
    assert len(lines) == 2 and "JAX_PROCESS_ID=1" in lines[1] and "device_count=4" in lines[1]


def test_gke_manifest_is_a_jobset():
    """The jobs in it are Kubernetes' own; JobSet's fields are those of its published schema, v1alpha2."""
    (whole,) = yaml.safe_load_all(launch("gke.sh", "run", "2", *TRAIN, **GKE, GKE_SLICES="3", GKE_QUEUE="q").stdout)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    assert set(whole["spec"]) == {"failurePolicy", "replicatedJobs"}
    (slices,) = whole["spec"]["replicatedJobs"]
    assert set(slices) == {"name", "replicas", "template"} and slices["replicas"] == 3
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run"}, "spec": slices["template"]["spec"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert pod["containers"][0]["command"] == list(TRAIN[1:])
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (mistake,) = whole["spec"]["failurePolicy"]["rules"]
    assert mistake["action"] == "FailJobSet" and mistake["onJobFailureReasons"] == ["PodFailurePolicy"]
    ends = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert EXIT_PREEMPTED not in ends["values"] and 2 in ends["values"]


# What process N does, and what the launcher makes of it. That the processes train: test_processes.py.
@pytest.mark.parametrize(
    "does, code",
    [
        ("exit 0", 0),
        ("exit $((N * 3))", 3),
        ("exit 75", 75),
        # One is killed: the others are asked to end, and made to where they do not.
        ("if ((N == 1)); then kill -9 $$; fi; trap 'exit 1' TERM; while true; do sleep 0.05; done", 137),
        ("if ((N == 1)); then kill -9 $$; fi; trap '' TERM; while true; do sleep 0.05; done", 137),
        # What lost another process says 75; what that one says counts.
        ("if ((N == 1)); then sleep 0.5; exit 2; fi; exit 75", 2),
    ],
)
def test_local_processes_end_together(does, code):
    command = ("2", "--", "bash", "-c", "N=$JAX_PROCESS_ID; " + does)
    assert launch("local.sh", *command, LUTHIER_GRACE="1").returncode == code
