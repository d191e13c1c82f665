"""What breaks readers: hostile values of fields, by kind of file."""

import json

import torch

#: Filled where a file made its reader call something.
executed = []


def execute(*_, **__):
    """What hostile files ask to be called."""
    executed.append("a file was executed")


LONG = "a" * 100_000
DEEP = 5_000

NUMBERS = (
    *("0", "-0", "-1", "1", "2", "3", "7", "255", "256", "1000", "65535"),
    *("2147483647", "2147483648", "4294967295", "4294967296"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("1" + "0" * 400, "9" * 5000, "1e400", "-1e400", "1e308", "1e-400"),
    *("0.5", ".5", "5.", "1.5", "1e3", "1_0", "0x10", "0b1", "010", "+1"),
    *("nan", "-nan", "inf", "-inf", "NaN", "Infinity", "-Infinity"),
    *("٣", "１２", "२", "²", "½", "1\u00a0", "-1.0", "1,5"),
)

TEXTS = (
    *("", " ", "\t", "\n", "\r", "\r\n", "\0", "\v", "\f", "\x1c", "\x85"),
    *(
        "\u2028",
        "\u2029",
        "\u202e",
        "\ufeff",
        "\u00a0",
        "e\u0301",
        "\U0001f600",
    ),
    *("\x1b[31mred", "\x1b]0;title\x07", "\x1b[2J", "\x7f", "\x08\x08"),
    *("a\nb", "a\n\nb", "a\rb", "a\tb", "a b", " a", "a ", "a\0b"),
    *("..", "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero"),
    *("/proc/self/mem", "/", ".", "~", "$HOME", "$data_root/", "$data_root"),
    *("file:///etc/passwd", "http://127.0.0.1:9/", "\\\\host\\x", "C:\\x"),
    *("-", "--", "--output", "|", "cat /etc/passwd |", "`x`", "%s%n", "{}"),
    *("{0}", "None", "null", "True", "true", "False", "[]", "()", "'", '"'),
    *('""', '"a', '"a\nb"', '"a""b"', "\\", "\\n", "\\u0000", ",", ",,", ";"),
    *("#", "=", "=1+1", "<b>", "a@0-9", "a@9-1", "a@0-", "a.tar#0"),
    *("a.tar#-1", "a.tar#x", ".tar#", "a.tar#" + "9" * 30, "a" * 300),
    *("a/" * 3000, LONG, "é" * 70_000, "[" * DEEP, "(" * DEEP, "{" * DEEP),
)

BYTES = (
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xff\xfea\0", b"\xfe\xff\0a"),
    *(b"\xef\xbb\xbf", b"\xe9", b"\xf4\x90\x80\x80"),
)


def in_text():
    """Values of a cell, a column or another part of a text."""
    return [*(each.encode() for each in (*NUMBERS, *TEXTS)), *BYTES]


def nested(opening, closing, depth=DEEP):
    return opening * depth + closing * depth


def in_json():
    """Values of a leaf, of a list or of an object."""
    kinds = ["null", "true", "false", "[]", "{}", "[null]", "[0]", '{"a": 0}']
    kinds += ["[[]]", '[1, "a"]', '["a"]', "[[0, 1]]", "[[0, 1], [2]]"]
    kinds += [r'"\ud800"', r'"\u0000"', r'"\u001b[31m"', "[1e400]"]
    kinds += [nested("[", "]"), nested("[", "]", 500), nested("[", "]", 50)]
    kinds += ['{"a":' * DEEP + "0" + "}" * DEEP, "[" + "0," * 50_000 + "0]"]
    kinds += ['{"a": 0, "a": 1}', "", ",", "0, 0", "NaN]", '{"class": "os"}']
    texts = [json.dumps(each) for each in (*NUMBERS, *TEXTS)]
    return [each.encode() for each in (*NUMBERS, *kinds, *texts)] + [
        b'"' + each + b'"' for each in BYTES
    ]


def in_json_key():
    texts = (*TEXTS, *NUMBERS[:4], "format", "a", "__class__", "__init__")
    return [json.dumps(each).encode() for each in texts] + [b"0", b"null"]


_TAGS = (
    *("!!python/object/apply:fuzz_values.execute []", "!!python/none"),
    *("!apply:fuzz_values.execute []", "!new:fuzz_values.execute []"),
    *("!new:fuzz_values.execute", "!apply:fuzz_values.execute", "!new:", "!x"),
    *("!name:fuzz_values.execute", "!module:os", "!ref <x>", "!ref <", "!copy"),
    *("!include:/etc/passwd", "!include:/dev/zero", "!PLACEHOLDER", "!tuple"),
    *("!applyref:fuzz_values.execute", "!new:torch.nn.Linear", "!!", "!", "!<"),
    *("!!binary ///", "!!binary '", "!!set {a, b}", "!!omap [a: 1]", "!!int x"),
    *("!!float x", "!!bool x", "!!timestamp x", "!!null x", "!!seq a"),
    *("!!map a", "!!str [a]", "!!pairs [a]", "!!omap a", "!!set a"),
)


def in_yaml():
    """Values of a leaf."""
    kinds = ["&a [*a]", "&a {b: *a}", "*a", "&", "*", "? a", "? [a]", "- a"]
    kinds += [
        "{a: 1, a: 2}",
        "{? [a] : 1}",
        "{[a]: 1}",
        "{{a: 1}: 1}",
        "|",
        ">",
    ]
    kinds += ["2020-01-01", "2020-99-99", "2020-01-01T99:99:99Z", "1:2:3"]
    kinds += ["0o9", "0o17", "1:99", "190:20:30.15", ".inf", "-.inf", ".nan"]
    kinds += ["<<", "{<<: 1}", "{<<: [1]}", "{<<: {a: 1}}", "<<: *a", "%", "@"]
    kinds += ["yes", "no", "Null", "~", "...", "---", "--- a", "%YAML 1.1"]
    kinds += ["a: b", "a: b: c", "[a, b", "{a", "'a", '"\\x"', '"\\ud800"']
    kinds += [nested("[", "]", 30), nested("[", "]", 400), "- " * 2000]
    kinds += ["[" + "0," * 20_000 + "0]", _laughs(9), _laughs(5)]
    return [each.encode() for each in (*_TAGS, *kinds, *NUMBERS, *TEXTS)] + [
        json.dumps(each).encode() for each in TEXTS
    ]


def _laughs(levels):
    """Ten to the power of `levels` values, by aliases of aliases."""
    lists = ["&l0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    for i in range(1, levels):
        lists.append(f"&l{i} [{', '.join([f'*l{i - 1}'] * 10)}]")
    return f"[{', '.join(lists)}]"


def of_bits(width, now=0):
    """Whole numbers of so many bits, those around the present one too."""
    powers = {2**k + d for k in range(0, 65, 4) for d in (-1, 0)}
    powers |= {2**31, 2**31 - 1, 2**63, 2**63 - 1, 3, 5, 24, 48, 1000, 8000}
    powers |= {16000, 44100, 10**6, 10**9}
    powers |= {now - 1, now + 1, 2 * now, now // 2, now * 256, -now, ~now}
    mask = (1 << width) - 1
    return sorted({each & mask for each in powers} - {now})


class Call:
    """Pickled, it asks for a call."""

    def __reduce__(self):
        return execute, ()


def in_state():
    """Values in what torch.save wrote."""
    deep = []
    for _ in range(300):
        deep = [deep]
    numbers = [0, 1, -1, 2**31, 2**63, 10**400, 0.5, -1.0, 1e308]
    numbers += [float("nan"), float("inf"), True, None, 1j]
    kinds = ["", "a", "\x1b[31m", LONG, b"a", (), [], {}, [0], {"a": 0}, deep]
    kinds += [set(), [None], {0: 0}, Call(), torch.float32, torch.Size([2])]
    small = torch.zeros(2)
    tensors = [torch.zeros(()), torch.zeros(0), small, torch.zeros(2, 3, 4)]
    tensors += [torch.zeros(0, 2**40), torch.zeros(1).expand(2**40)]
    tensors += [torch.zeros(1).expand(2**20, 2**20), small.to(torch.int64)]
    tensors += [small.bool(), small.to(torch.complex64), small.double()]
    tensors += [small.bfloat16(), small.half(), small.to_sparse()]
    tensors += [torch.nn.Parameter(small), torch.empty(2, device="meta")]
    tensors += [torch.full((2,), float("nan")), torch.arange(8)[::2]]
    tensors += [torch.quantize_per_tensor(small, 1.0, 0, torch.qint8)]
    return numbers + kinds + tensors


def in_sql():
    """Values of a cell."""
    numbers = [0, 1, -1, 2, 2**31, 2**63 - 1, -(2**63), 0.5, 1e308, None]
    texts = [each for each in TEXTS if len(each) < 10**5]
    blobs = [b"", b"\0", b"\xff" * 15, b"\xff" * 16, bytes(64), bytes(10**5)]
    return [float("inf"), *numbers, *texts, *NUMBERS, *blobs]
