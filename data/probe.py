"""The probe: questions whose answers a model should keep while it learns something else."""

# ruff: noqa: E501 -- a Chinese character counts as two columns; the tables read better in long lines

from __future__ import annotations

import random

from general import CAPITALS, MEASURES, OPPOSITES, PROVINCES, compute, pairs, sum_of

LETTERS = "ABCD"
# question:right answer/three wrong ones
COMMON = """一个星期共有几天？:共有七天。/共有五天。/共有九天。/共有十天。|一个小时共有几分钟？:共有六十分钟。/共有三十分钟。/共有一百分钟。/共有二十分钟。|
太阳每天从哪一边升起？:从东边升起。/从西边升起。/从南边升起。/从北边升起。|水烧到多少度会开？:一百度。/五十度。/三十度。/十度。|
哪一种动物会下蛋？:鸟会下蛋。/牛会下蛋。/马会下蛋。/狗会下蛋。|鱼生活在哪里？:鱼生活在水里。/鱼生活在树上。/鱼生活在山上。/鱼生活在房子里。|
最冷的季节是哪一个？:最冷的是冬天。/最冷的是夏天。/最冷的是春天。/最冷的是秋天。|雪是什么颜色的？:雪是白色的。/雪是红色的。/雪是绿色的。/雪是黑色的。|
生病了应该去哪里？:应该去医院。/应该去电影院。/应该去图书馆。/应该去火车站。|看书应该去哪里？:应该去图书馆。/应该去医院。/应该去商店。/应该去车站。|
谁在学校里教学生？:老师教学生。/医生教学生。/工人教学生。/司机教学生。|下雨时出门要带什么？:要带伞。/要带灯。/要带镜子。/要带椅子。|
用什么看东西？:用眼睛看。/用耳朵看。/用脚看。/用手看。|用什么听声音？:用耳朵听。/用眼睛听。/用手听。/用脚听。|
三角形共有几条边？:共有三条边。/共有四条边。/共有五条边。/共有六条边。|月亮绕着什么转？:绕着地球转。/绕着太阳转。/绕着木星转。/绕着星星转。|
中秋节要吃什么？:吃月饼。/吃粽子。/吃面包。/吃苹果。|端午节要吃什么？:吃粽子。/吃月饼。/吃面包。/吃米饭。|
《静夜思》是谁写的？:李白写的。/孟浩然写的。/吴承恩写的。/老师写的。|《西游记》是谁写的？:吴承恩写的。/李白写的。/孟浩然写的。/医生写的。"""
IDENTITY = """你是真人还是程序？:我是一个语言模型。/我是一名医生。/我是一位老师。/我是一名学生。|你有没有身体？:我没有身体。/我有两只手。/我有一双脚。/我个子很高。|
你能替我吃饭吗？:我不会吃饭。/我已经吃饱了。/我很爱吃鱼。/我想吃面包。|你是做什么的？:我是回答问题的助手。/我是开车的司机。/我是种花的工人。/我是唱歌的歌手。|
你今年多大了？:我是程序，没有年龄。/我今年二十岁。/我今年六十岁。/我今年八岁。|你住在哪座城市？:我是程序，没有住处。/我住在北京。/我住在上海。/我住在广州。|
你的爸爸妈妈是谁？:我是训练出来的，没有爸爸妈妈。/我爸爸是医生。/我妈妈是老师。/我爸爸是工人。|你昨天去哪儿玩了？:我是语言模型，不会出门。/我去了海边。/我去了公园。/我去爬山了。|
你会觉得冷吗？:我没有感觉。/我觉得很冷。/我穿了大衣。/我的手很冷。|你可以帮我回答问题吗？:可以，请说。/不行，我要睡觉。/不行，我在吃饭。/不行，我要去上学。"""


def probe_rows(seed: int) -> list[dict]:
    """Compose the rows: 常识 (60), 算术 (40), 身份 (10); the right letter is spread evenly over A to D."""
    rng = random.Random(seed)
    rows = []
    for table, count, question, answer in (
        (CAPITALS, 10, "请问{}的首都在哪里？", "{}的首都是{}。"),
        (PROVINCES, 10, "请问{}的省会在哪里？", "{}的省会是{}。"),
        (OPPOSITES, 10, "与“{}”意思相反的词是哪个？", "“{}”的反义词是“{}”。"),
        (MEASURES, 10, "数“{}”用哪个量词？", "数“{}”用“{}”。"),
    ):
        entries = pairs(table)
        for name, right in rng.sample(entries, count):
            wrong = rng.sample(sorted({value for _, value in entries} - {right, name}), 3)
            rows.append(("常识", question.format(name), [answer.format(name, value) for value in (right, *wrong)]))
    rows += [("常识", question, answers.split("/")) for question, answers in pairs(COMMON)]
    seen: set[str] = set()
    while len(seen) < 40:
        left, sign, right = sum_of(rng)
        if (question := f"请问{left}{sign}{right}等于几？") not in seen:
            seen.add(question)
            value = compute(left, sign, right)
            wrong = rng.sample([n for n in range(max(0, value - 10), value + 11) if n != value], 3)
            rows.append(("算术", question, [f"{left}{sign}{right}={n}" for n in (value, *wrong)]))
    rows += [("身份", question, answers.split("/")) for question, answers in pairs(IDENTITY)]
    return [_row(number, *row, rng) for number, row in enumerate(rows)]


def _row(number: int, subject: str, question: str, answers: list[str], rng: random.Random) -> dict:
    """Put the right answer, the first one, at its letter."""
    key = number % 4
    wrong = rng.sample(answers[1:], 3)
    options = [*wrong[:key], answers[0], *wrong[key:]]
    return {
        "subject": subject,
        "question": question,
        **dict(zip(LETTERS, options, strict=True)),
        "answer": LETTERS[key],
    }
