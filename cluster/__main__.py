"""The command line: `python3 -m cluster COMMAND`. Results go to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import json
import sys

from cluster import images, providers, settings, storage, supervisor, tools
from cluster.errors import ClusterError


def main() -> int:
    """Runs one command and returns the exit status."""
    arguments = _parser().parse_args()
    try:
        _dispatch(arguments, settings.load())
    except ClusterError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _dispatch(arguments: argparse.Namespace, instance: settings.Settings) -> None:
    match arguments.command:
        case "up":
            print(providers.up(instance))
        case "down":
            providers.down(instance, purge=arguments.purge)
        case "info":
            print(json.dumps(providers.info(instance), indent=2))
        case "status":
            print(providers.status(instance))
        case "node":
            providers.change_node(instance, arguments.action, arguments.name)
        case "tool":
            print(tools.kubectl(instance) if arguments.name == "kubectl" else tools.helm(instance))
        case "image":
            _image(arguments, instance)
        case "supervise":
            supervisor.supervise(instance)
        case "provision":
            storage.provision(instance)


def _image(arguments: argparse.Namespace, instance: settings.Settings) -> None:
    if arguments.action == "build":
        print(images.build(instance, arguments.target, arguments.build_arg, push=arguments.push))
    else:
        images.load(instance, arguments.reference)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m cluster", description="A Kubernetes cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start a cluster and print its kubeconfig")
    down = commands.add_parser("down", help="remove the cluster; what was built and pulled stays cached")
    down.add_argument("--purge", action="store_true", help="remove the cache as well")
    commands.add_parser("info", help="print what scripts need to know, as JSON")
    commands.add_parser("status", help="print the parts, their pids and restarts")
    node = commands.add_parser("node", help="stop, kill or start a node (built cluster only)")
    node.add_argument("action", choices=["stop", "kill", "start"])
    node.add_argument("name")
    tool = commands.add_parser("tool", help="print the path of a kubectl or helm that fits")
    tool.add_argument("name", choices=["kubectl", "helm"])
    image = commands.add_parser("image", help="build or load an image")
    actions = image.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="build a target of the Dockerfile, push it, print its reference")
    build.add_argument("--target", required=True)
    build.add_argument("--build-arg", action="append", default=[], metavar="KEY=VALUE")
    build.add_argument("--no-push", dest="push", action="store_false", help="build only; needs no cluster yet")
    load = actions.add_parser("load", help="pull an image on every node, so that pods start at once")
    load.add_argument("reference")
    # Internal: what the cluster itself runs.
    commands.add_parser("supervise")
    commands.add_parser("provision")
    return parser


if __name__ == "__main__":
    sys.exit(main())
