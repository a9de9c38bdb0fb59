"""Texts that similar tokenizers encode differently.

Tokenizers differ in the steps around the vocabulary: normalizing, splitting, adding and stripping spaces, matching
special tokens, falling back to bytes. Ordinary prose hardly depends on them; these texts do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TORTURE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "empty": "",
        "one space": " ",
        "spaces at both ends": "   word   ",
        "runs of spaces": "a b  c   d    e        f                g",
        "tabs": "\tif x:\n\t\treturn\t# end\t",
        "line ends": "unix\nwindows\r\nold mac\rblank\n\n\nlines\r\n\r\n",
        "vertical tab, form feed, next line": "a\x0bb\x0cc\x85d\u2028e\u2029f",
        "unusual spaces": "a\u00a0b\u1680c\u2002d\u2003e\u2009f\u202fg\u205fh\u3000i",
        "control characters": "".join(chr(code) for code in (*range(1, 32), *range(127, 160))),
        "the null character": "before\0after",
        "characters of no width": "\ufeffa\u200bb\u200cc\u200dd\u2060e\u00adf\u180eg",
        "private use and unassigned": "\ue000\uf8ff\U000f0000\U0010fffd\u0378\ufffe\uffff",
        "the replacement character": "\ufffd\ufffd and \ufffd",
        "composed": "\u00e9 \u00f1 \u1e69 \uac00 \u01d5 \u0439",
        "decomposed": "e\u0301 n\u0303 s\u0323\u0307 \u1100\u1161 U\u0308\u0304 \u0438\u0306",
        "marks in another order": "q\u0307\u0323 q\u0323\u0307",
        "lone combining marks": "\u0301 \u0323\u0308 \u20dd\u0489 \ufe0f",
        "many combining marks": "z" + "\u0301\u0323\u0335\u0489" * 30,
        "compatibility forms": (
            "\ufb01\ufb00 \u00bd \u2460 \u2122 \u210c \uff21\uff42\uff13 \uff76\uff9e \u33a5 x\u00b2"
        ),
        "letters of mathematics": "\U0001d400\U0001d41b\U0001d4b8 \U0001d538\U0001d539 \U0001d7d8\U0001d7e1",
        "case that changes the length": "\u00df \u1e9e \u0130 \u0131 \ufb03 \u03a3\u03c3\u03c2 \u01c5",
        "right to left": (
            "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u0633\u064e\u0644\u064e\u0627\u0645 \u0661\u0662\u0663"
        ),
        "overrides of direction": "a\u202eb\u202dc\u202cd\u2066e\u2067f\u2069g\u200eh\u200fi",
        "emoji": "\U0001f600\U0001f44d\U0001f3fe\u2764\ufe0f\u2764\ufe0e1\ufe0f\u20e3",
        "joined emoji": (
            "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f4\u200d\u2620\ufe0f\U0001f9d1"
            "\U0001f3fb\u200d\U0001f680"
        ),
        "flags, and half a flag": (
            "\U0001f1eb\U0001f1f7\U0001f1ef\U0001f1f5\U0001f1e7 \U0001f3f4\U000e0067\U000e0062\U000e0065"
            "\U000e006e\U000e0067\U000e007f"
        ),
        "Chinese, Japanese, Korean": (
            "\u6f22\u5b57\u4eee\u540d\u4ea4\u3058\u308a\u6587\uff0c\u30c6\u30b9\u30c8\u3002\ud55c\uad6d\uc5b4 "
            "\U00020000\U0002a6d6"
        ),
        "Indic and Thai": (
            "\u0915\u094d\u0937\u0924\u094d\u0930\u093f\u092f \u0bb8\u0bcd\u0bb0\u0bc0 \u0e20\u0e32\u0e29\u0e32"
            "\u0e44\u0e17\u0e22 \u1019\u103c\u1014\u103a\u1019\u102c"
        ),
        "mixed scripts": "p\u0430yp\u0430l \u0391BC\u0412 \u4e2da\u6587b \u0e01x\u05d0y",
        "old scripts": "\U00012000\U00013000\U00010330 \u16a0\u16b1 \u1681",
        "digits": "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1_000 0x1F 1e-9 \u0664\u0665 \u00b2\u2075",
        "punctuation": (
            "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ ... !!! ?! -- --- == != /* */ // ``` \u2014 \u201cx\u201d \u00abx\u00bb"
        ),
        "contractions": "I'm you're he's we've they'll I'd don't CAN'T it\u2019s 'TWAS O'Neil's",
        "spaces before punctuation": "Hello , world . Isn ' t it ? do n't wo n't 's",
        "words in capitals": "camelCase PascalCase SCREAMING_CASE kebab-case iPhone McDonald eBay",
        "special tokens of others": (
            "<s></s><unk><pad><mask> <|endoftext|><|im_start|>user<|im_end|> [INST] [/INST] <<SYS>>"
        ),
        "more special tokens": (
            "<bos><eos><start_of_turn><end_of_turn> <|begin_of_text|><|eot_id|> [CLS][SEP] <0x0A><extra_id_0>"
        ),
        "almost special tokens": "< s > <|im_start |> <|IM_START|> <|im_start| <|endoftext <|endof\u200btext|> </s <S>",
        "signs that tokenizers use": "\u2581word \u2581\u2581 \u0120word \u010a \u00c4\u0142 ##ing @@ </w>",
        "code": (
            'def f(x: list[int]) -> str:\n    return f"{x[0]!r:>8}\\n"  # caf\u00e9\n\n\nif __name__ == "__main__'
            '":\n    f([1])\n'
        ),
        "markup": '<p class="a">&nbsp;&lt;b&gt;</p>\n| a | b |\n|---|---|\n- [ ] x\n$$\\frac{1}{2}$$',
        "an address": "https://example.org/a_b?c=%20d&e=f#g mailto:x+y@example.org C:\\Temp\\new.txt ~/.a",
        "a long word": "a" * 2000,
        "a long word of many letters": "abcdefghij" * 200,
        "a long run of spaces": " " * 1000,
        "a long run of line ends": "\n" * 500,
        "a long run of punctuation": "=" * 1000 + "-" * 1000,
        "a long number": "1234567890" * 100,
        "a long run of emoji": "\U0001f600" * 300,
        "a long run without spaces": "\u7684" * 500,
    }
)
"""The texts by the feature that they test. None has a lone surrogate (half a character): no tokenizer accepts one."""
