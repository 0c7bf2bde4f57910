"""The volume of the tests: the demo's model and data, and the same model cut short."""

from pathlib import Path

from demo import assets, volume
from demo.kube import Kubectl as DemoKubectl
from tests.e2e.jobs import SMALL
from tests.e2e.kube import Kubectl

TOOLBOX = volume.POD
"""A pod with the trainer's image that mounts the volume at /mnt."""

_CUT = """
import pathlib, sys
source, target = sys.argv[1:]
if pathlib.Path(target, "tokenizer.json").exists():
    sys.exit()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.model.layers = model.model.layers[:2]
model.config.num_hidden_layers = 2
if getattr(model.config, "layer_types", None):
    model.config.layer_types = model.config.layer_types[:2]
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""


def fill(kubectl: Kubectl, image: str, log: Path) -> None:
    """Makes the claim, the toolbox and the models and data on the volume; removes the results of earlier runs."""
    client = DemoKubectl(kubectl.binary, kubectl.kubeconfig, kubectl.namespace, log)
    volume.fill(client, image, assets.fetch(log))
    volume.start_pod(client, image)
    kubectl.exec(TOOLBOX, "sh", "-c", "rm -rf /mnt/outputs /mnt/checkpoints /mnt/datasets/bad")
    small = f"/mnt/{SMALL.split('/', 3)[3]}"
    kubectl.exec(TOOLBOX, "python", "-c", _CUT, f"/mnt/models/{assets.MODEL}", small)
