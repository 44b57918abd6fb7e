"""Names of people, places and organisations, and news-like sentences around them (entity files)."""

# ruff: noqa: E501 -- a Chinese character counts as two columns; the tables read better in long lines

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

SURNAMES = list(
    "王李张刘陈杨黄赵周吴徐孙马朱胡林郭何高罗郑梁谢宋唐许韩冯邓曹彭曾肖田董潘袁蔡余于叶程魏苏吕丁任卢姚沈钟姜崔谭陆范汪石贾"
)
SURNAMES += ["欧阳", "上官", "司马", "诸葛"]
GIVEN = list(
    "明华建国文志伟军海涛晓春丽秀英玉兰芳红梅燕雪静婷敏慧佳宁欣怡思远子涵宇轩浩然博俊杰鹏飞立新永康德厚世昌"
    "学礼家栋振邦云霞美珍淑琴桂香小雨若冰天佑承志可心一鸣安平清和庆瑞光耀东升长林"
)
PLACE_FIRST = list("清江青白金银龙凤云石临安南北东西永宁新长平河海松柳梅桃竹兰枫文武康泰丰和昌乐吉福宝秀玉明月星阳")
PLACE_SECOND = list("河江山水川源州城溪湖泉潭台岭原坪塘港湾浦桥门关阳阴安宁平丰化昌")
PLACE_SUFFIX = ["市", "县", "镇", "村", "区", "省", "乡", "岛", "州"]
LANDMARK_SUFFIX = [
    "山",
    "湖",
    "河",
    "古城",
    "草原",
    "大桥",
    "公园",
    "水库",
    "火车站",
    "机场",
    "码头",
    "峡谷",
    "广场",
    "老街",
]
FIELDS = [
    "电力",
    "纺织",
    "医药",
    "农业",
    "机械",
    "建筑",
    "食品",
    "汽车",
    "软件",
    "航空",
    "钢铁",
    "化工",
    "文化",
    "环保",
    "物流",
    "能源",
    "水利",
    "茶叶",
    "旅游",
    "乳业",
    "海洋",
    "气象",
    "林业",
    "教育",
    "服装",
]
COMPANY_SUFFIX = ["集团", "公司", "有限公司", "股份公司", "总厂"]
SOCIETY_SUFFIX = ["研究院", "研究所", "协会", "基金会", "学会"]
LOCAL_ORGS = [
    "图书馆",
    "博物馆",
    "公安局",
    "教育局",
    "气象局",
    "消防队",
    "交响乐团",
    "京剧团",
    "电视台",
    "日报社",
    "人民法院",
    "文化馆",
    "银行",
    "出版社",
    "美术馆",
    "商会",
    "环保局",
    "体育局",
    "晚报社",
    "水务局",
    "少年宫",
]
SCHOOLS = [
    "第一中学",
    "第二中学",
    "实验学校",
    "师范大学",
    "理工大学",
    "农业大学",
    "医学院",
    "外国语学校",
    "大学",
    "音乐学院",
]
HOSPITALS = ["人民医院", "中心医院", "第一医院", "中医院", "儿童医院", "红十字医院"]
TEAMS = ["足球队", "篮球队", "排球队", "乒乓球队"]
BRANDS = [
    "华兴",
    "金辉",
    "东方红",
    "远航",
    "天和",
    "新世纪",
    "百川",
    "同心",
    "长虹桥",
    "光明路",
    "宏达",
    "鼎新",
    "飞跃",
    "永信",
    "蓝海",
    "星火",
    "四方",
    "恒安达",
    "春晖",
    "银河湾",
    "安泰",
    "博雅",
    "众合",
    "千里马",
]
PERSON, PLACE, ORG = "人名", "地名", "机构名"

# {P} a person, {L} a place, {O} an organisation; a figure tells apart several of one kind; {d} a day, {n} a number
TEMPLATES = """
{d}，{P}在{L}接受了记者采访。
{P}担任{O}的负责人已有{n}年。
{C}昨天在{L}举行了新产品发布会。
从{L}到{L2}的铁路预计明年通车。
{P}和{P2}一同来到{L}考察。
来自{L}的选手{P}获得了冠军。
{O}与{O2}签订了长期合作协议。
据{L}居民介绍，{S}的游客今年已超过{n}万。
{P}出生在{L}的一个农民家庭。
{d}，{L}下起了今年的第一场雪。
{O}的{P}对此作了详细说明。
{P}毕业后一直在{O}工作。
{L}的茶农今年迎来了好收成。
{d}，{P}当选为{O}的新任会长。
记者从{O}了解到，{S}的维修将于年底完工。
{P}捐出{n}万元，用于{L}的学校建设。
{H}派出{n}名医生前往{L}支援。
在{L}，{P}开了一家小小的书店。
{P}把这本书送给了老朋友{P2}。
{O}主任{P}说，大家都很辛苦。
{L}和{L2}之间新开了一条公交线路。
{O}在{L}设立了分部，由{P}主管。
比赛中，{P}的表现得到了教练{P2}的肯定。
{d}，{P}率队访问了{O}。
每到春天，{S}的游客就多了起来。
{U}公布了{n}项研究成果，{P}是主要作者。
{P}从{L}坐了{n}个小时的火车才到家。
{P}、{P2}和{P3}获得了一等奖。
位于{L}的{U}今年招收新生{n}百人。
{L}、{L2}等地将有大雨。
演出由{O}主办，{P}担任主持。
{P}说：“我最想念的还是{L}。”
“谢谢{P}老师！”孩子们大声喊道。
{C}决定在{L}和{L2}各建一座仓库。
{P}曾在{L}生活了{n}年，后来搬到了{L2}。
受{O}邀请，{P}在{L}作了一场报告。
{d}，{C}向{L}运送了{n}吨大米。
画家{P}的作品被{O}收藏。
{P}的女儿考上了{U}。
{L}的老人们都记得{P}这个名字。
{T}以三比一战胜了{T2}。
本报记者{P}在{L}报道。
{P}驾车经过{S}，赶往{L}参加会议。
{n}年前，{P}创办了{C}。
{O}的志愿者{d}来到{L}种树。
{P}离开{O}以后，由{P2}接替他的工作。
新路建成后，从{S}到{L}只要{n}分钟。
经{P}介绍，{P2}加入了{O}。
{O}、{O2}和{O3}共同发起了这次活动。
作家{P}的新书写的是{L}的往事。
{d}，一批文物从{L}运抵{O}。
歌手{P}将在{L}举办演唱会。
{U}教师{P}认为，{L}的水质正在变好。
警方在{S}找到了走失的{P}。
{C}工程师{P}住在{L}。
{L}到处张贴着{O}的招工启事。
{P}在{O}当了{n}年保安。
老张家没去成，{P}倒是去了{L}。
{S}今天重新开放，{P}是第一位游客。
{O}请来{P}为职工讲课。
{P}写信给{O}，反映{L}的交通问题。
“{S}真美！”{P}感叹道。
{P}是{L}人，现年{n}岁。
{d}，{P}与{P2}在{L}喜结良缘。
{C}将迁往{L}，{P}表示支持。
{P}带着学生参观了{O}。
{L}的苹果通过{C}销往各地。
他们从{S}出发，走了{n}天，终于到达{L}。
{U}的食堂请了{L}的厨师。
{P}三次路过{S}，都没有停下来。
{P}和家人一起去{S}游玩。
{S}位于{L}以北{n}公里处。
{d}，{P}在{S}附近迷了路。
{S}上空飞过一群大雁。
{T}的队长{P}因伤缺席了比赛。
{P}拍摄的{S}登上了画报。
{H}的护士{P}受到病人称赞。
{C}与{U}合作培养技术人员。
{P}从{U}毕业后回到了{L}。
今年{n}月，{L}将迎来一批新居民。
{P}花了{n}年时间学习木工。
{O}已连续{n}年获得先进单位称号。
{d}，{C}宣布降低产品价格。
{L}的夜晚灯火通明，十分热闹。
{P}用{n}天写完了这篇文章。
{U}的学生们{d}参加了义务劳动。
{d}，{H}开设了夜间门诊。
村民们都说{P}是个热心人。
{S}的门票从{d}起降价。
{T}{d}回到主场训练。
{P}的摄影作品获得了金奖。
{C}的新厂房已经动工。
{L}计划新建{n}所小学。
""".strip().splitlines()
TEMPLATES = [t for t in TEMPLATES if not t.startswith("老张家")]

EMPTY = """
{d}，天气晴好，{w}里到处是{x}的人。
这项{y}已经进行了{n}个月，进展顺利。
专家提醒，{s}要注意{h}。
他把{n}本{k}整齐地放在书架上。
{s}来了，孩子们盼着去{w}{x}。
这种{k}的价格比去年上涨了百分之{n}。
会议讨论了{y}的有关问题。
我们要坚持不懈，把{y}做得更好。
{d}，有{n}名学生报名参加了{y}。
妈妈说，{s}吃点热的对身体好。
大家一边{x}，一边谈论着{y}。
新的{k}很快就卖完了，只剩下{n}件。
调查显示，{n}成居民喜欢在{w}里{x}。
老师让同学们写一篇关于{s}的作文。
由于准备充分，这次{y}取得了圆满成功。
他花了{n}天时间，终于修好了那台旧{k}。
{w}门口排起了长队，大家都在等{k}。
记者发现，{s}去{w}的人比往常多。
只要每天{x}{n}分钟，身体就会越来越好。
她从小就爱{x}，这个习惯保持了{n}年。
{d}，{w}里新添了{n}台{k}。
为了{y}，他已经连续工作了{n}个小时。
{s}的早晨，{w}里十分安静。
不少家长带着孩子到{w}里{x}。
""".strip().splitlines()
DAYS = [
    "昨天",
    "今天上午",
    "前天",
    "上周五",
    "本月初",
    "去年秋天",
    "今年三月",
    "五月十日",
    "星期一",
    "近日",
    "日前",
    "元旦当天",
    "上个月",
    "八月底",
    "周末",
    "当天下午",
]
NUMBERS = ["三", "五", "六", "八", "十", "十二", "十五", "二十", "三十", "四十", "五十", "七", "九", "两"]
EMPTY_WORDS = {
    "w": ["商场", "菜市场", "校园", "体育馆", "电影院", "公园", "阅览室", "车站", "食堂", "小区"],
    "x": ["跑步", "看书", "下棋", "散步", "唱歌", "画画", "打球", "跳舞", "做操", "聊天"],
    "y": [
        "科技竞赛",
        "节水工作",
        "绿化工程",
        "读书活动",
        "安全检查",
        "城市建设",
        "垃圾分类",
        "音乐比赛",
        "扶贫工作",
        "防洪演练",
    ],
    "s": ["春天", "夏天", "秋天", "冬天", "雨季", "假期", "节日", "开学季"],
    "h": ["防火", "保暖", "饮食卫生", "交通安全", "用电安全", "多喝水", "早睡早起"],
    "k": ["自行车", "收音机", "小说", "词典", "电脑", "洗衣机", "地图", "画册", "冰箱", "相机"],
}
MEASURED_BOOKS = {"小说", "词典", "地图", "画册"}
MACHINES = {"自行车", "收音机", "电脑", "洗衣机", "冰箱", "相机"}

INSTRUCTS = [
    "请找出文本中的人名、地名和机构名，每行写一个，格式为“实体_类型”，按出现的先后排列；若一个也没有，就写“没有”。",
    "你的任务是识别文本里的人名、地名、机构名。按顺序逐行输出“实体_实体类型”，没有就回答“没有”。",
    "阅读下面的文本，抽取其中的人名、地名、机构名，以“实体_类型”的形式一行一个列出。没有实体时输出“没有”。",
    "从文本中提取命名实体，类型只有人名、地名、机构名三种。每个实体占一行，写成“实体_类型”；找不到则写“没有”。",
]


# names the composition could yield that belong to well-known people
NOT_NAMES = set(
    "李鹏 朱德 邓小平 陈云 马云 李长春 吴邦国 王光美 胡春华 刘德华 姚明 余华 陈永 王健 李建国 张德江 郭晓明 黄晓明 刘晓庆 李宇春 邓丽君 周海媚 "
    "孙杨 李雪健 冯远征 胡德平 余秀华 王家卫 陈冲 李明博 王刚 徐静蕾 李小雨 刘国梁 李宁 张艺 郭明 张海迪 张国立 李连杰 马冰".split()
)


def is_reserved(name: str) -> bool:
    """Tell whether a name is kept for the held-out file (about one in eight)."""
    return zlib.crc32(name.encode()) % 8 == 0


def person(rng: random.Random) -> str:
    """Compose a person's name."""
    last = rng.choice([char for char in GIVEN if char not in "子可小一世家学承香桂"])
    given = rng.choice([char for char in GIVEN if char not in "长林"]) + last if rng.random() < 0.75 else last
    name = rng.choice(SURNAMES) + given
    return name if len(set(name)) == len(name) and name not in NOT_NAMES else person(rng)


def place_stem(rng: random.Random) -> str:
    """Compose the stem of a place name."""
    while True:
        first, second = rng.choice(PLACE_FIRST), rng.choice(PLACE_SECOND)
        if first != second:
            return first + second


def place(rng: random.Random) -> str:
    """Compose the name of an administrative place."""
    stem = place_stem(rng)
    return stem + rng.choice([s for s in PLACE_SUFFIX if s not in stem])


def landmark(rng: random.Random) -> str:
    """Compose the name of a sight or a public place."""
    stem = place_stem(rng)
    return stem + rng.choice([s for s in LANDMARK_SUFFIX if s[0] not in stem and s[-1] not in stem])


def _local(suffixes: list[str]) -> Callable[[random.Random], str]:
    """Return a maker of names such as 清河市人民医院."""
    return lambda rng: place_stem(rng) + rng.choice(["市", "县", "", "省", "区"]) + rng.choice(suffixes)


def company(rng: random.Random) -> str:
    """Compose the name of a company."""
    head = rng.choice(BRANDS) if rng.random() < 0.5 else place_stem(rng)
    return head + rng.choice(FIELDS) + rng.choice(COMPANY_SUFFIX)


def society(rng: random.Random) -> str:
    """Compose the name of an institute or an association."""
    head = rng.choice(BRANDS) if rng.random() < 0.4 else place_stem(rng)
    return head + rng.choice(FIELDS) + rng.choice(SOCIETY_SUFFIX)


def organisation(rng: random.Random) -> str:
    """Compose the name of an organisation of any sort."""
    return rng.choice((company, society, _local(LOCAL_ORGS), _local(LOCAL_ORGS), _local(SCHOOLS)))(rng)


MAKERS: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "P": (person, PERSON), "L": (place, PLACE), "S": (landmark, PLACE), "O": (organisation, ORG), "C": (company, ORG),
    "U": (_local(SCHOOLS), ORG), "H": (_local(HOSPITALS), ORG), "T": (_local(TEAMS), ORG),
}  # fmt: skip
SLOTS = ("P", "P2", "P3", "L", "L2", "S", "O", "O2", "O3", "C", "U", "H", "T", "T2")


def draw_name(letter: str, rng: random.Random, reserved: bool = False) -> str:
    """Draw a name of one kind, either a reserved one or never a reserved one."""
    maker = MAKERS[letter][0]
    while True:
        name = maker(rng)
        if is_reserved(name) == reserved:
            return name


def filler(text: str, rng: random.Random) -> str:
    """Fill the slots of a sentence that are not names."""
    words = {"d": rng.choice(DAYS), "n": rng.choice(NUMBERS)} | {k: rng.choice(v) for k, v in EMPTY_WORDS.items()}
    if (
        "{n}年" not in text
        and "{n}" in text
        and words["n"] == "两"
        and "两" + text.split("{n}")[1][:1] in ("两万", "两岁", "两成")
    ):
        words["n"] = "八"
    if "{n}成" in text:
        words["n"] = rng.choice("三五六七八九")
    if "{n}本{k}" in text:
        words["k"] = rng.choice(sorted(MEASURED_BOOKS))
    if "台{k}" in text or "台旧{k}" in text:
        words["k"] = rng.choice(sorted(MACHINES - {"自行车"}))
    if "现年{n}" in text:
        words["n"] = rng.choice(["二十", "三十", "四十", "五十", "三十五", "四十八"])
    for slot, word in words.items():
        text = text.replace("{" + slot + "}", word)
    return text


def sentence(rng: random.Random, reserved: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Write a sentence with names; return it with its (name, type) pairs in order of appearance."""
    while True:
        text = filler(rng.choice(TEMPLATES), rng)
        names: list[tuple[str, str]] = []
        for slot in SLOTS:
            mark = "{" + slot + "}"
            if mark in text:
                name = draw_name(slot[0], rng, reserved)
                names.append((name, MAKERS[slot[0]][1]))
                text = text.replace(mark, name)
        surfaces = [name for name, _ in names]
        if all(text.count(name) == 1 for name in surfaces) and 12 <= len(text) <= 47:
            return text, sorted(names, key=lambda pair: text.index(pair[0]))


def answer_of(names: list[tuple[str, str]]) -> str:
    """Write the answer: one ``name_type`` a line, or 没有."""
    return "\n".join(f"{name}_{kind}" for name, kind in names) or "没有"


def entity_rows(train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Compose the training and the held-out rows; names of the held-out rows occur nowhere in the training rows."""
    rng = random.Random(seed)

    def make(count: int, reserved: bool, banned: set[str]) -> tuple[list[dict], set[str]]:
        rows: list[dict] = []
        seen: set[str] = set()
        used: set[str] = set()
        while len(rows) < count:
            text, names = (filler(rng.choice(EMPTY), rng), []) if rng.random() < 0.15 else sentence(rng, reserved)
            if text in seen or text in banned or any(name in text for name in banned):
                continue
            seen.add(text)
            used.update(name for name, _ in names)
            rows.append({"instruct": rng.choice(INSTRUCTS), "query": "文本：" + text, "answer": answer_of(names)})
        return rows, used

    held, held_names = make(heldout, True, set())
    held_texts = {row["query"].removeprefix("文本：") for row in held}
    rows, _ = make(train, False, held_names | held_texts)
    return rows, held
