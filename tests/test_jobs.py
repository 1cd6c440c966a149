"""The examples for job arrays, as far as they go without a cluster."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests import program

SCRIPT = program.ROOT / "docs" / "jobs" / "head.sh"
JOB = yaml.safe_load((SCRIPT.parent / "heads.yaml").read_text())


def run(folder, number, *flags, variable="SLURM_ARRAY_TASK_ID"):
  env = program.environment(folder / "cache") | {"RUNS": str(folder / "heads")}
  env |= {"PYTHON": sys.executable} | ({variable: number} if number else {})
  command = [str(SCRIPT), *flags]
  return subprocess.run(
    command, cwd=program.ROOT, env=env, capture_output=True, text=True
  )


def test_a_job_without_a_number_says_so(tmp_path):
  done = run(tmp_path, None)
  assert done.returncode and "no number of a job array" in done.stderr
  assert not (tmp_path / "heads").exists()


@pytest.mark.slow
def test_a_job_trains_its_head_and_goes_on_when_it_is_started_again(tmp_path):
  flags = program.tiny_flags(program.save_arrays(tmp_path / "data"))
  folder = tmp_path / "heads" / "3"
  for variable in "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX":
    done = run(tmp_path, "3", *flags, variable=variable)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["heads"] == [3] and numbers["steps"] == program.STEPS


def test_the_kubernetes_job_is_indexed_and_runs_the_script():
  spec = JOB["spec"]
  assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
  assert spec["completionMode"] == "Indexed"
  pod = spec["template"]["spec"]
  assert pod["restartPolicy"] == "OnFailure"
  (container,) = pod["containers"]
  script, config = container["command"]
  assert program.ROOT / script == SCRIPT and os.access(SCRIPT, os.X_OK)
  assert (program.ROOT / config.removeprefix("--config=")).is_file()
  mounts = {mount["name"] for mount in container["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]}
  runs = {pair["name"]: pair["value"] for pair in container["env"]}["RUNS"]
  assert runs.startswith(container["volumeMounts"][0]["mountPath"])


def test_what_the_script_says_to_run_is_there():
  text = SCRIPT.read_text()
  for module in re.findall(r"python -m (experiments\.\w+)", text):
    assert (program.ROOT / f"{module.replace('.', '/')}.py").is_file()
