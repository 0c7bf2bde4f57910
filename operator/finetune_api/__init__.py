"""The contract between the operator, the trainer and the people who write YAML.

Everything here is plain pydantic: no cluster, no torch. The operator, the trainer and the command line import this package;
it imports none of them.
"""
