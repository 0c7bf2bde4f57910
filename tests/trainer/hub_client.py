"""Resolves and downloads one hub source, as a rank does: `python -m tests.trainer.hub_client SOURCE_JSON CACHE_DIR`."""

import json
import sys
from pathlib import Path

from finetune_api.launch import HubSource
from finetune_trainer.errors import TrainerError
from finetune_trainer.hub import local_path, resolve_revision

source = HubSource.model_validate_json(sys.argv[1])
uri = f"hf://{source.repo_id}"
try:
    commit = resolve_revision(source, uri, "model")
    path = local_path(source, commit, Path(sys.argv[2]), uri, "model")
    print(json.dumps({"commit": commit, "path": str(path)}))
except TrainerError as error:
    print(json.dumps({"reason": error.reason, "message": str(error)}))
