"""The `finetune` command: what people type beside kubectl."""
