"""Write RefCOCO's pickle and its boxes as JSON, which `python -m tasks refcoco` then reads: the pickle is read once.

    python -m tools.refs "refcoco/refs(unc).p" refcoco.json

pickle     refs(unc).p, refs(umd).p
instances  instances.json (default: beside the pickle)
"""

from formats.files import write_json
from tasks.refcoco import read_pickle
from tools import command


def refs(pickle, out, /, instances=None):
    rows = read_pickle(pickle, instances)
    write_json(out, {"refs": rows})
    print(f"{out}: {len(rows)} refs")


main = command(__name__, refs)
