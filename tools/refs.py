"""Write RefCOCO's pickle and its boxes as JSON, which `python -m tasks refcoco` then reads: the pickle is read once.

    python -m tools.refs "refcoco/refs(unc).p" refcoco.json
"""

import argparse
import sys

from formats.files import write_json
from tasks.refcoco import read_pickle


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickle", help="refs(unc).p, refs(umd).p")
    parser.add_argument("out", help="JSON to write")
    parser.add_argument("--instances", help="instances.json (default: beside the pickle)")
    args = parser.parse_args(argv)
    refs = read_pickle(args.pickle, args.instances)
    write_json(args.out, {"refs": refs})
    print(f"{args.out}: {len(refs)} refs")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tools.refs: {error}")
