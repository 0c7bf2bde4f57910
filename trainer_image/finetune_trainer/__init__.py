"""The program in a job's pods: a small supervisor that starts the ranks, and the ranks that train.

Read it in this order: `supervisor` starts one `rank` for each process; a rank goes `config` → `distributed` → `model` →
`data` → `loop` → `checkpoint` → `export`.
"""
