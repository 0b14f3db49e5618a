"""Write train.jsonl and validation.jsonl: ``python -m swift.data.snow_alerts.generate [FOLDER] [SEED]``.

Every number of a notice is copied from its facts, and no fact is computed. Thresholds follow the signals of the China
Meteorological Administration for snowstorm and road icing: 4, 6, 10 and 15 mm of snow from blue to red.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from swift.data.snow_alerts.places import ADVICE, LEVELS, PLACES, Place
from swift.files import new_file

SEED = 2026
NUM_TRAIN, NUM_VALIDATION = 480, 60
_SYSTEM = {
    "en": "Write weather notices from the facts given.",
    "zh": "根据事实写气象通知。",
}
# kind -> (English, Chinese, levels, advice)
_KINDS = {
    "snowfall": ("heavy snow", "大雪", ("III", "IV"), "snow"),
    "blizzard": ("blizzard", "暴雪", ("I", "II", "III", "IV"), "snow"),
    "icing": ("road icing", "道路结冰", ("I", "II", "III"), "ice"),
    "freezing": ("freezing", "低温冰冻", ("I", "II", "III", "IV"), "cold"),
}
_MONTHS = {11: "November", 12: "December", 1: "January", 2: "February", 3: "March"}
_SNOW_MM = {"I": (15, 40), "II": (10, 24), "III": (6, 14), "IV": (4, 9)}
_HOURS = {"I": (6, 12), "II": (6, 12), "III": (12, 24), "IV": (12, 24)}
_COLD = {"I": (-30, -18), "II": (-22, -12), "III": (-16, -7), "IV": (-11, -4)}


@dataclass(frozen=True)
class Facts:
    """What is known of one warning; amounts that a kind does not have are None."""

    kind: str
    level: str
    place: Place
    month: int
    day: int
    clock: str
    hours: int
    snow_mm: int | None
    depth_cm: int | None
    wind_force: int | None
    temperature: int
    advice: tuple[int, ...]
    hotline: str

    def core(self) -> tuple[object, ...]:
        """What makes two warnings the same whatever their time and advice."""
        return (
            self.kind,
            self.level,
            self.place.en,
            self.hours,
            self.snow_mm,
            self.depth_cm,
            self.wind_force,
            self.temperature,
        )


def draw(randomness: random.Random) -> Facts:
    kind = randomness.choice(list(_KINDS))
    place = randomness.choice(PLACES)
    level = randomness.choice([level for level in _KINDS[kind][2] if level != "IV" or place.has_blue])
    is_snow = kind in ("snowfall", "blizzard")
    snow_mm = randomness.randint(*_SNOW_MM[level]) if is_snow else None
    return Facts(
        kind=kind,
        level=level,
        place=place,
        month=randomness.choice(list(_MONTHS)),
        day=randomness.randint(1, 28),
        clock=f"{randomness.randint(0, 23):02d}:{randomness.randint(0, 59):02d}",
        hours=randomness.choice(_HOURS[level]),
        snow_mm=snow_mm,
        depth_cm=snow_mm + randomness.randint(0, 8) if snow_mm is not None and kind == "blizzard" else None,
        wind_force=None if kind == "icing" else randomness.randint(4, 9 if level in ("I", "II") else 6),
        temperature=randomness.randint(-9, -1) if kind == "icing" else randomness.randint(*_COLD[level]),
        advice=tuple(randomness.sample(range(6), randomness.choice((1, 1, 2)))),
        hotline=randomness.choice(place.hotlines),
    )


def row(facts: Facts, language: str, randomness: random.Random) -> dict[str, object]:
    """The row in the messages format."""
    ask, tell = (_ask_en, _tell_en) if language == "en" else (_ask_zh, _tell_zh)
    return {
        "messages": [
            {"role": "system", "content": _SYSTEM[language]},
            {"role": "user", "content": ask(facts, randomness)},
            {"role": "assistant", "content": tell(facts, randomness)},
        ]
    }


def _ask_en(facts: Facts, randomness: random.Random) -> str:
    name, _, _, topic = _KINDS[facts.kind]
    lines = [
        randomness.choice(("Notice in English:", "English notice, please.", "Write it in English.")),
        f"Warning: {name}, level {facts.level} ({LEVELS[facts.level][0]})",
        f"Area: {facts.place.en}",
        f"Issued: {facts.day} {_MONTHS[facts.month]} {facts.clock}, {facts.place.office_en}",
        f"Valid: {facts.hours} hours",
    ]
    if facts.snow_mm is not None:
        lines.append(f"Snowfall: {facts.snow_mm} mm")
    if facts.depth_cm is not None:
        lines.append(f"Snow depth: {facts.depth_cm} cm")
    if facts.wind_force is not None:
        lines.append(f"Wind: force {facts.wind_force}")
    lines.append(f"{'Road' if facts.kind == 'icing' else 'Lowest'} temperature: {facts.temperature} °C")
    lines.append("Advice: " + "; ".join(ADVICE[topic][index][0] for index in facts.advice))
    lines.append(f"Hotline: {facts.hotline}")
    return "\n".join(lines)


def _tell_en(facts: Facts, randomness: random.Random) -> str:
    name, _, _, topic = _KINDS[facts.kind]
    colour = LEVELS[facts.level][0]
    time = f"{facts.clock} on {facts.day} {_MONTHS[facts.month]}"
    title = f"{colour.capitalize()} warning: {name} in {facts.place.en}"
    opening = randomness.choice(
        (
            f"At {time}, {facts.place.office_en} issued a level {facts.level} warning.",
            f"{facts.place.office_en} issued a level {facts.level} warning at {time}.",
        )
    )
    advice = [ADVICE[topic][index][0] for index in facts.advice]
    call = randomness.choice((f"For help, call {facts.hotline}.", f"Questions? Call {facts.hotline}.", f"Call {facts.hotline} for help."))
    steps = f"Please {', and '.join(advice)}."
    return f"{title}\n{opening} {_outlook_en(facts, randomness)}\n{steps} {call}"


def _outlook_en(facts: Facts, randomness: random.Random) -> str:
    span = randomness.choice((f"In the next {facts.hours} hours", f"Over the next {facts.hours} hours"))
    if facts.kind == "icing":
        ice = randomness.choice(("roads will ice over", "ice will form on roads"))
        return f"{span}, {ice}, with a road temperature of {facts.temperature} °C."
    tail = f"winds of force {facts.wind_force} and temperatures down to {facts.temperature} °C"
    if facts.snow_mm is None:
        return f"{span}, expect hard frost, {tail}."
    fall = randomness.choice((f"expect {facts.snow_mm} mm of snow", f"{facts.snow_mm} mm of snow will fall"))
    depth = f", lying {facts.depth_cm} cm deep" if facts.depth_cm is not None else ""
    return f"{span}, {fall}{depth}, with {tail}."


def _ask_zh(facts: Facts, randomness: random.Random) -> str:
    _, name, _, topic = _KINDS[facts.kind]
    lines = [
        randomness.choice(("中文通知：", "写中文通知。", "请用中文。")),
        f"预警：{name}{LEVELS[facts.level][1]}（{facts.level}级）",
        f"地区：{facts.place.zh}",
        f"发布：{facts.month}月{facts.day}日{facts.clock}，{facts.place.office_zh}",
        f"时效：{facts.hours}小时",
    ]
    if facts.snow_mm is not None:
        lines.append(f"降雪量：{facts.snow_mm}毫米")
    if facts.depth_cm is not None:
        lines.append(f"积雪：{facts.depth_cm}厘米")
    if facts.wind_force is not None:
        lines.append(f"风力：{facts.wind_force}级")
    lines.append(f"{'路面温度' if facts.kind == 'icing' else '最低气温'}：{facts.temperature}℃")
    lines.append(f"建议：{ADVICE[topic][facts.advice[0]][1]}")
    lines.append(f"电话：{facts.hotline}")
    return "\n".join(lines)


def _tell_zh(facts: Facts, randomness: random.Random) -> str:
    _, name, _, topic = _KINDS[facts.kind]
    colour = LEVELS[facts.level][1]
    opening = f"{facts.place.office_zh}{facts.month}月{facts.day}日{facts.clock}发布{name}{colour}预警："
    steps = f"请{ADVICE[topic][facts.advice[0]][1]}。"
    call = randomness.choice((f"咨询电话{facts.hotline}。", f"求助请打{facts.hotline}。"))
    return f"{opening}{_outlook_zh(facts, randomness)}\n{steps}{call}"


def _outlook_zh(facts: Facts, randomness: random.Random) -> str:
    span = randomness.choice((f"未来{facts.hours}小时{facts.place.zh}", f"{facts.place.zh}未来{facts.hours}小时"))
    if facts.kind == "icing":
        return f"{span}路面温度降至{facts.temperature}℃，道路可能结冰。"
    tail = f"风力{facts.wind_force}级，最低气温{facts.temperature}℃。"
    if facts.snow_mm is None:
        return f"{span}有低温冰冻，{tail}"
    depth = f"积雪{facts.depth_cm}厘米，" if facts.depth_cm is not None else ""
    return f"{span}降雪量达{facts.snow_mm}毫米，{depth}{tail}"


def rows(seed: int = SEED) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(train, validation): 480 and 60 rows, three of five in English; no two warnings are the same."""
    randomness = random.Random(seed)
    seen: set[tuple[object, ...]] = set()
    made: list[dict[str, object]] = []
    while len(made) < NUM_TRAIN + NUM_VALIDATION:
        facts = draw(randomness)
        if facts.core() in seen:
            continue
        seen.add(facts.core())
        made.append(row(facts, "en" if len(made) % 5 < 3 else "zh", randomness))
    return made[:NUM_TRAIN], made[NUM_TRAIN:]


def write(folder: Path, seed: int = SEED) -> None:
    """Write both files, each at once."""
    for name, part in zip(("train", "validation"), rows(seed), strict=True):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in part)
        with new_file(folder / f"{name}.jsonl") as temporary:
            temporary.write_bytes(text.encode("utf-8"))


if __name__ == "__main__":
    write(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent,
        int(sys.argv[2]) if len(sys.argv) > 2 else SEED,
    )
