"""Slurm, Kubernetes, containers: every launcher ends in recipes/torchrun.sh, and says what its platform needs."""

import os
import pathlib
import shutil
import signal
import subprocess

import pytest
import yaml
from support.commands import ROOT
from support.forks import free_port
from support.launch import ENDLESS, TINY, environment, final_state, started, wait_for_step

LINE, IN_IMAGE = "bash recipes/torchrun.sh", "bash /opt/fasttrain/recipes/torchrun.sh"
SCRIPTS = [*ROOT.glob("*.sh"), *ROOT.glob("recipes/*.sh"), ROOT / "recipes/slurm.sbatch", ROOT / ".ci/run"]


def stub(folder: pathlib.Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_every_launcher_ends_in_the_same_line() -> None:
    job = yaml.safe_load((ROOT / "recipes/kubernetes.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert " ".join(container["command"]) == IN_IMAGE
    assert {" ".join(service["entrypoint"]) for service in services.values()} == {IN_IMAGE}
    assert dockerfile.count('CMD ["bash", "/opt/fasttrain/recipes/torchrun.sh"') == dockerfile.count("FROM ") == 2
    assert f'{LINE} "$@"' in (ROOT / "recipes/slurm.sbatch").read_text()


def test_kubernetes_job_has_what_the_operator_needs() -> None:
    job = yaml.safe_load((ROOT / "recipes/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]["pytorchReplicaSpecs"]) == {"Worker"}  # elastic jobs have no master
    elastic = job["spec"]["elasticPolicy"]
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert {"medium": "Memory", "sizeLimit": "8Gi"} in [v.get("emptyDir") for v in pod["volumes"]]
    for option, value in zip(container["args"][::2], container["args"][1::2], strict=True):
        assert option not in ("--data", "--run") or any(value.startswith(path) for path in mounts.values())


def test_containers_run_as_a_user_of_their_own_that_is_not_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    users = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("USER ")]
    job = yaml.safe_load((ROOT / "recipes/kubernetes.yaml").read_text("utf-8"))
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    context = pod["securityContext"]
    assert users == 2 * [str(context["runAsUser"])]  # a number, which runAsNonRoot can judge
    assert dockerfile.count(f"--uid {users[0]} ") == 2
    assert context["runAsNonRoot"] is True
    assert context["fsGroup"] == context["runAsUser"]
    assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_containers_are_given_shared_memory_and_folders() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert f" AS {name}\n" in dockerfile
        assert {volume.split(":")[1] for volume in service["volumes"]} == {"/data", "/runs"}
    assert services["gpu"]["gpus"] == "all"
    assert services["gpu"]["shm_size"]
    copied = {word for line in dockerfile.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)


@pytest.mark.parametrize("engine", ["docker", "podman", "buildah"])
def test_the_image_is_built_and_tried_as_another_user(tmp_path: pathlib.Path, engine: str) -> None:
    for name in ("docker", "podman", "buildah"):
        stub(tmp_path, name, 'echo "$(basename "$0") $*" >>"$(dirname "$0")/log"' if name == engine else "exit 1")
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = ["bash", str(ROOT / "recipes/image.sh")]
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text("utf-8")
    assert f"{engine} build --target cpu " in log
    assert f"{engine} run " in log
    assert "--user 12345:12345 " in log


def test_without_an_engine_the_image_is_one_clear_line(tmp_path: pathlib.Path) -> None:
    for name in ("docker", "podman", "buildah"):
        stub(tmp_path, name, "exit 1")
    words, own = ["bash", ROOT / "recipes/image.sh"], {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(words, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "image.sh: error: no engine here builds images: docker, podman or buildah\n"


def test_install_uses_a_vendors_packages_where_it_is_told_to(tmp_path: pathlib.Path) -> None:
    """The GPU image's own PyTorch must neither be replaced nor hidden."""
    shutil.copy(ROOT / "install.sh", tmp_path)
    stub(tmp_path, "dpkg-query", "echo install ok installed")
    # stands for the interpreter: notes how the environment is made, and makes one whose pip notes what it is told
    stub(tmp_path, "python", 'echo "$@" >>log; [ "$2" != venv ] || { mkdir -p .venv/bin; cp pip .venv/bin/pip; }')
    stub(tmp_path, "pip", 'echo "$@" >>log')
    path = f"{tmp_path}:{os.environ['PATH']}"
    for variables, made, versions in (
        ({}, "-m venv .venv", True),
        ({"BASE_PACKAGES": "1"}, "-m venv --system-site-packages .venv", False),
    ):
        shutil.rmtree(tmp_path / ".venv", ignore_errors=True)
        (tmp_path / "log").unlink(missing_ok=True)
        own = {**os.environ, "PATH": path, "PYTHON": str(tmp_path / "python"), "EXTRAS": "ffcv", **variables}
        subprocess.run(["bash", "install.sh"], check=True, cwd=tmp_path, env=own)
        log = (tmp_path / "log").read_text().splitlines()
        assert made in log
        assert ("-c constraints.txt" in log[-1]) is versions
        assert log[-1].endswith("-e .[ffcv]")


def test_slurm_job_saves_before_its_time_is_up_and_is_queued_again(
    shards: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The real script, torchrun and training; stand-ins for Slurm's commands, which pass signals on as Slurm does."""
    tools, run, log = tmp_path / "tools", tmp_path / "run", tmp_path / "log"
    tools.mkdir()
    stub(tools, "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    stub(tools, "scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >>{tmp_path}/scontrol')
    slurm = {
        "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 17, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": 1,
        "PET_NPROC_PER_NODE": 2, "PET_MAX_RESTARTS": 1, "PORT": free_port(), "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    words = ["bash", ROOT / "recipes/slurm.sbatch", "--data", shards, "--run", run, *TINY, *ENDLESS]
    with started(list(map(str, words)), log, **slurm) as job:
        wait_for_step(run, 4, job)
        job.send_signal(signal.SIGUSR1)  # to the batch shell alone
        assert job.wait(90) != 0, log.read_text()
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    text = log.read_text()
    step = final_state(run)["step"]
    assert f"stopped by SIGUSR1 at step {step};" in text
    assert "continuing" not in text  # torchrun did not take the stop for a failure to recover from
    (tmp_path / "scontrol").unlink()
    again = {**slurm, "PET_NPROC_PER_NODE": 1, "SLURM_RESTART_COUNT": 1}
    with started([*list(map(str, words)), "--max-steps", str(step + 2)], log, **again) as job:
        assert job.wait(90) == 0, log.read_text()
    assert f"continuing {run} from step {step}" in log.read_text()
    assert not (tmp_path / "scontrol").exists()


def test_launcher_starts_one_process_without_a_gpu_and_relative_paths_are_those_of_where_it_is_typed(
    tmp_path: pathlib.Path,
) -> None:
    stub(tmp_path, "nvidia-smi", "exit 9")
    (tmp_path / "photos").mkdir()
    own = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    words = ["bash", ROOT / "recipes/torchrun.sh", "--data", "photos"]
    job = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=own, check=False)
    assert job.returncode == 1
    assert job.stderr.count("photos: no images") == 1
