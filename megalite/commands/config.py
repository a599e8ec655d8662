"""Explain a config key, or print the JSON schema of configs.

megalite config explain megalite.parallel.tensor
megalite config explain stage                      every key with this ending
megalite config schema > megalite.schema.json      then "$schema": "./megalite.schema.json" in a config
"""

import json

from megalite.config.explain import explain
from megalite.config.schema import json_schema
from megalite.ranks.arguments import ArgumentParser, RawHelpFormatter


def main(arguments: list[str]) -> int:
    """Explains a key or prints the schema; returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawHelpFormatter)
    whats = parser.add_subparsers(dest="what", required=True, metavar="explain|schema")
    explaining = whats.add_parser("explain", help="show a key's meaning, type, default and rule")
    explaining.add_argument("key", metavar="KEY", help="a dotted path, or the end of one")
    whats.add_parser("schema", help="print a JSON schema for editors")
    options = parser.parse_args(arguments)
    if options.what == "schema":
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(explain(options.key)))
    return 0
