"""Launchers: what they would run, what they refuse, and several local processes for real."""

import json
import os
import pathlib
import subprocess
import sysconfig

import kubernetes_validate
import pytest
import tiny_run
import yaml

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
        ("tpu_vm.sh", ("run", *TRAIN), {**TPU, "TPU_IMAGE": ""}, "set TPU_IMAGE"),
        ("tpu_vm.sh", ("Run!", *TRAIN), TPU, "NAME must be"),
        ("tpu_vm.sh", ("run",), TPU, "after NAME --"),
        ("gke.sh", ("run", "2", *TRAIN), {**GKE, "GKE_IMAGE": ""}, "set GKE_IMAGE"),
        ("gke.sh", ("run", "two", *TRAIN), GKE, "HOSTS must be"),
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


def test_gke_manifest_is_kubernetes():
    service, job = yaml.safe_load_all(launch("gke.sh", "run", "2", *TRAIN, **GKE).stdout)
    for resource in (service, job):
        kubernetes_validate.validate(resource, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == list(TRAIN[1:])
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert {"name": "TPU_WORKER_HOSTNAMES", "value": "run-0.run,run-1.run"} in pod["containers"][0]["env"]


def test_local_processes_train_as_one(tmp_path):
    config = tiny_run.write_run(tmp_path, "c.stage(data=DATA, steps=3, batch_size=8, sequence_length=48)")
    command = tiny_run.command(config, tmp_path / "two", "mesh.data=1", "mesh.fsdp=4")
    done = launch("local.sh", "2", "2", "--", *command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["devices"]["processes"] == 2
    assert [record["step"] for record in tiny_run.metrics(tmp_path / "two")] == [1, 2, 3]
    assert launch("local.sh", "2", "--", "bash", "-c", "exit $((JAX_PROCESS_ID * 3))").returncode == 3
