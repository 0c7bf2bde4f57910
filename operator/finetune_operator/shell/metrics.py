"""The operator's Prometheus metrics, all in one place."""

from prometheus_client import Counter, Gauge, Histogram

_FAST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

RECONCILES = Counter("finetune_operator_reconciles", "Reconciles by result.", ["result"])
RECONCILE_SECONDS = Histogram("finetune_operator_reconcile_seconds", "Duration of a reconcile.", buckets=_FAST)
QUEUE_DEPTH = Gauge("finetune_operator_queue_depth", "Jobs that wait for a reconcile.")
JOBS = Gauge("finetune_operator_jobs", "FineTuneJobs by state.", ["state"])
RESTARTS = Counter(
    "finetune_operator_restarts", "Attempts that ended and were followed by another, by reason.", ["reason"]
)
FAILURES = Counter("finetune_operator_failures", "Jobs that became Failed, by reason.", ["reason"])
API_REQUESTS = Counter("finetune_operator_api_requests", "Requests to the API server.", ["verb", "resource", "code"])
API_SECONDS = Histogram(
    "finetune_operator_api_request_seconds",
    "Duration of requests to the API server.",
    ["verb", "resource"],
    buckets=_FAST,
)
IS_LEADER = Gauge("finetune_operator_is_leader", "1 while this replica acts.")
SYNCED = Gauge("finetune_operator_synced", "1 once all jobs and their children have been listed.")
FIRST_PASS_SECONDS = Gauge(
    "finetune_operator_first_pass_seconds", "From the start of leading until every job had been looked at once."
)
CHILDREN_SECONDS = Histogram(
    "finetune_operator_children_seconds", "From a new job being seen until its child Job was applied.", buckets=_FAST
)
POLLS = Counter("finetune_operator_progress_polls", "Polls of rank 0's progress, by result.", ["result"])
EVENTS_LOST = Counter("finetune_operator_events_lost", "Kubernetes events that could not be written.")
