"""What the coverage-guided search begins with, and how one of its inputs is written."""

CUT = b"\xff"
"""Ends a piece of an input. The piece's first byte says what descriptors go with it: how many in
its high half, more than three being none, and which in the low one."""

SEEDS = [
    CUT.join([b"\0" + piece for piece in pieces])
    for pieces in (
        [b'{"path":"/none.png"}\n'],
        [b'{"op":"ping","id":7}\n{"op":"he', b'llo"}\n'],
        [b'{"op":"status","id":"x"}\n', b'{"op":"reload"}\n'],
        [b'{"id":-1,"op":"compute","path":"/","timeout_ms":5}\r\n', b""],
        [b'{"id":[[[[]]]],"op":null}\n', b"\n" * 9, b'{"a":1,"a":NaN}\n'],
        [b'{"op":"ping","x":"' + b"x" * 1005, b'"}\n', b'{"op":"ping"}\n'],
        [b'{"path":"\\u0000\\ud800"}\n', b'{"id":' + b"9" * 30 + b"}\n"],
    )
] + [b"\x10{}\n", b"\x12{}\n\xff\x10{", b'\x20{"op":"ping"}\n', b"\x01{\xff\x11}\n"]
