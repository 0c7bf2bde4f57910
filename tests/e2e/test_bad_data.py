"""Bad data ends Failed with the reason, the file and the line in the condition, and nothing hangs."""

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.jobs import CLAIM, start
from tests.e2e.volume import TOOLBOX

pytestmark = pytest.mark.cluster

GOOD_LINE = '{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}'
CASES = {
    "missing-file": (None, ("missing-file.jsonl", "no such file")),
    "broken-json": (f"{GOOD_LINE}\n{GOOD_LINE}\n{{broken\n", ("broken-json.jsonl", ":3:", "JSON")),
    "empty-conversation": (f'{GOOD_LINE}\n{{"messages": []}}\n', ("empty-conversation.jsonl:2:",)),
    "no-usable-sample": (
        '{"messages": [{"role": "user", "content": "hello"}]}\n',
        ("no-usable-sample.jsonl", "no usable sample"),
    ),
}


def test_bad_data_fails_at_once_and_names_file_and_line(cluster: Cluster) -> None:
    jobs = {}
    for name, (text, _) in CASES.items():
        path = f"/mnt/datasets/bad/{name}.jsonl"
        if text is not None:
            cluster.kubectl(
                "exec", "-i", TOOLBOX, "--", "sh", "-c", f"mkdir -p /mnt/datasets/bad && cat > {path}", stdin=text
            )
        data = {"train": [{"uri": f"pvc://{CLAIM}/datasets/bad/{name}.jsonl"}]}
        jobs[name] = start(cluster.kubectl, f"bad-{name}", {"datasets": {**data, "evaluation": []}})
    for name, job in jobs.items():
        status = job.wait_state("Failed")
        condition = job.conditions()["Failed"]
        assert status["reason"] == "DataError", status
        assert status.get("restarts", 0) == 0
        for part in CASES[name][1]:
            assert part.lower() in condition["message"].lower(), (name, condition["message"])
