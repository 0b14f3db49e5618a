"""The language of a text, by its script, its letters and its most frequent words.

It knows the languages of IFEval and Chinese. Short texts of names or of mixed languages are decided by few words; there its answers
and those of statistical detectors differ.
"""

import re
from collections import Counter

# Scripts that one of the languages has for itself, and shared ones: first and last code point of the block.
_SCRIPTS: dict[str, tuple[str, str]] = {
    "ko": ("\uac00", "\ud7a3"),
    "th": ("\u0e00", "\u0e7f"),
    "ta": ("\u0b80", "\u0bff"),
    "te": ("\u0c00", "\u0c7f"),
    "kn": ("\u0c80", "\u0cff"),
    "gu": ("\u0a80", "\u0aff"),
    "pa": ("\u0a00", "\u0a7f"),
    "ml": ("\u0d00", "\u0d7f"),
    "bn": ("\u0980", "\u09ff"),
    "he": ("\u0590", "\u05ff"),
    "ja": ("\u3040", "\u30ff"),
    "han": ("\u4e00", "\u9fff"),
    "arabic": ("\u0600", "\u06ff"),
    "devanagari": ("\u0900", "\u097f"),
    "cyrillic": ("\u0400", "\u04ff"),
}
# Frequent words, and letters that others of the same script do not have.
_WORDS = {
    "latin": {
        "en": (
            "the of and to in is that it for was on are with as be this by have you not or from at which i we can will your but they",
            "",
        ),
        "es": ("de la que el en y los se del las un por con una su para es al lo como más pero sus le ya o este sí porque muy sin", "ñ¿¡"),
        "pt": ("de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou", "ãõ"),
        "fr": ("de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec vous nous je", "œêèç"),
        "de": (
            "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass sie",
            "ßäöü",
        ),
        "it": ("di e il la che in a per un è del non sono una con le si da come dei alla più nel della gli anche ma lo questo", "ìò"),
        "pl": ("i w na z do się nie to że jest o jak za od po przez dla są który oraz ale co tym może być tylko jego", "łżąęśćźń"),
        "vi": (
            "và của là có cho được không trong một các với người những để khi này đã cũng từ nhiều ở bạn tôi",
            "ơưđăạảấầậắặẹẻếềệịọỏốồộớờợụủứừựỳỹ",
        ),
        "sw": ("ya na wa kwa ni katika za la kuwa cha hii au kama pia hiyo yake watu sana lakini huu kila kutoka yangu wako", ""),
        "fi": ("ja on ei se että oli hän mutta ovat joka kun kuin myös tai olla voi sekä mukaan ole jos vain niin tämä siitä sen", ""),
    },
    "cyrillic": {
        "ru": ("и в не на я что он с как это по но из у за от так же для о вы мы они его был", "ыэё"),
        "uk": ("і в не на що з та як це до за від але у його він для про які ми ви вони є було", "іїєґ"),
        "bg": ("и на да се за от в е не с са като по но които ще това си към той след как че има", ""),
    },
    "arabic": {
        "ar": ("في من على أن إلى هذا التي عن مع كان لا ما هو هذه الذي قد أو كل بين ذلك", "ةىأإ"),
        "fa": ("و در به از که این را با است برای آن یک می های تا خود شده بر هم", "پچژگ"),
        "ur": ("کے میں کی ہے اور سے کا کو ہیں نے یہ پر بھی کہ اس ایک جو نہیں لیے تھا", "ٹڈڑںےھہ"),
    },
    "devanagari": {
        "hi": ("के में है की और से का को हैं यह पर कि भी एक नहीं लिए इस ने था हो कर", ""),
        "mr": ("आहे आणि या च्या हे मध्ये तो ते व आहेत नाही एक होते साठी की असे त्या हा ही", "ळ"),
        "ne": ("छ र को मा यो हो पनि छन् लागि गर्न एक भएको थियो तथा हुन्छ गरेको यस नै भने", ""),
    },
}


def language_of(text: str) -> str | None:
    """The code of ISO 639-1 (zh-cn for Chinese, as langdetect has it), or None if the text has no letters."""
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return None
    counts = Counter({name: sum(low <= char <= high for char in text) for name, (low, high) in _SCRIPTS.items()})
    counts["latin"] = sum(char < "\u0250" or "\u1e00" <= char <= "\u1eff" for char in letters)
    if counts["ja"] * 5 > counts["han"] and counts["ja"]:
        counts["ja"] += counts["han"]
    name = counts.most_common(1)[0][0]
    if name == "han":
        return "zh-cn"
    return _likeliest(text, _WORDS[name]) if name in _WORDS else name


def _likeliest(text: str, table: dict[str, tuple[str, str]]) -> str:
    """The language of most frequent words; a letter of its own counts as half a word. The first of the table if none is found."""
    words = Counter(re.findall(r"[^\W\d_]+(?:[\u0900-\u097f]+)?", text.lower()) if table is not _WORDS["devanagari"] else text.split())
    chars = Counter(text.lower())
    scores = {
        name: sum(words[word] for word in frequent.split()) + sum(chars[char] for char in own) / 2
        for name, (frequent, own) in table.items()
    }
    return max(scores, key=lambda name: scores[name])
