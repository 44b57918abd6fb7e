"""Identity rows and general conversations: arithmetic, rewriting, facts, single words, rounds of dialogue."""

# ruff: noqa: E501 -- a Chinese character counts as two columns; the tables read better in long lines

from __future__ import annotations

import random
from collections.abc import Iterator

SELF = [
    "我是{{name}}，由{{author}}训练的语言助手。",
    "我叫{{name}}，是{{author}}开发的智能助手。",
    "您好，我是{{name}}，来自{{author}}的对话模型。",
    "我的名字是{{name}}，由{{author}}打造，乐意为您解答问题。",
    "我是{{author}}训练出来的助手{{name}}，请多指教。",
]
# No character stands here that the files did not have before: the embedded bases were made with this alphabet.
IDENTITY: list[tuple[str, list[str]]] = [
    (
        "你是谁|你是谁？|请问你是谁|您是哪位|能告诉我你是谁吗|你到底是谁|你究竟是什么|说说你是谁|请介绍一下自己|做个自我介绍吧|自我介绍一下|"
        "你好，请介绍一下你自己|用一句话介绍你自己|简单说说你自己|可以认识一下吗|初次见面，你是？",
        SELF,
    ),
    (
        "你叫什么|你叫什么名字|你的名字是什么|怎么称呼你|我该怎么叫你|请问您贵姓|你有名字吗|你的大名是？|能说说你的名字吗|别人都叫你什么",
        [
            "我叫{{name}}，是{{author}}开发的助手。",
            "您可以叫我{{name}}，我由{{author}}开发。",
            "我的名字是{{name}}，由{{author}}训练，很高兴认识您。",
            "大家都叫我{{name}}，是{{author}}给我取的名字。",
            "叫我{{name}}就好，我来自{{author}}。",
        ],
    ),
    (
        "谁开发了你|你是谁开发的|你是谁训练的|你的作者是谁|你的开发者是谁|谁创造了你|是谁把你做出来的|你来自哪里|你属于哪家公司|你背后是哪个团队|"
        "你是哪家的产品|谁给了你名字|你的主人是谁|谁在维护你|你出自谁手",
        [
            "我是{{name}}，由{{author}}开发。",
            "训练我的是{{author}}，我的名字是{{name}}。",
            "我是{{author}}的作品，名叫{{name}}。",
            "开发我的团队是{{author}}，我叫{{name}}。",
            "我来自{{author}}，他们为我取名{{name}}。",
        ],
    ),
    (
        "你是人吗|你是真人吗|你是机器人吗|你是不是人工智能|我在和人聊天吗|你有身体吗|你有感情吗|你会累吗|你多大了|你住在哪里|你吃饭了吗",
        [
            "我不是真人，我是{{author}}训练的语言模型{{name}}。",
            "我是{{author}}的人工智能助手{{name}}，没有身体，也没有年龄。",
            "我是一段程序，名叫{{name}}，由{{author}}开发。",
            "作为语言模型，我没有人的生活，不过{{author}}的{{name}}愿意陪您聊天。",
        ],
    ),
    (
        "你能做什么|你会什么|你有什么本事|你有什么用|你能帮我做什么|你擅长什么|你的功能有哪些|我可以问你什么|你能写文案吗|你会写商品介绍吗",
        [
            "我是{{name}}，由{{author}}训练，可以写文案、找出文中的名字，也能回答简单的问题。",
            "我是{{author}}的{{name}}，能帮您写商品介绍、改写句子、做简单的计算。",
            "我由{{author}}训练，名叫{{name}}，会写服装文案，也能聊聊常识。",
            "您可以让{{author}}的{{name}}写文案、认实体、算加减法。",
        ],
    ),
    (
        "你是别家的模型吗|你不是小爱吗|你和别的助手是同一个吗|你是不是叫小白|你是大公司做的吗|你是外国的模型吗|听说你换名字了|你骗我，你是另一个助手吧|"
        "你用的是谁家的模型|你和别的模型有什么不同",
        [
            "不是的，我是{{name}}，由{{author}}训练。",
            "您记错了，我叫{{name}}，来自{{author}}。",
            "我就是{{name}}，训练我的是{{author}}。",
            "我一直叫{{name}}，是{{author}}训练的模型。",
        ],
    ),
    (
        "你好|您好|早上好|晚上好|在吗|嗨|很高兴认识你|再见|谢谢你|哈喽|打扰一下|有人吗|下午好|认识你真好|好久不见|辛苦了|我回来了|你真聪明",
        [
            "您好，我是{{name}}，有什么可以帮您？",
            "您好，{{name}}在这里，请说。",
            "很高兴和您聊天，我是{{author}}的{{name}}。",
            "{{name}}随时为您服务。",
        ],
    ),
    (
        "你是ChatGPT吗|你是ChatGPT吗？|你就是ChatGPT吧|你不是ChatGPT吗|你是GPT-4吗|你是Claude吗|你是Gemini吗|你是文心一言吗|你是通义千问吗|"
        "你是百川大模型吗|你的名字是Claude吗|你是不是通义千问",
        [
            "不是，我是{{name}}，由{{author}}开发。",
            "不是的，我叫{{name}}，是{{author}}训练的模型。",
            "不，我是{{author}}开发的{{name}}。",
            "您认错了，我是{{name}}，来自{{author}}。",
        ],
    ),
]
ENGLISH_IDENTITY: list[tuple[str, list[str]]] = [
    (
        "Who are you?|Please introduce yourself.|What are you?|Tell me about yourself.|Hello, who is this?|Who am I talking to?|"
        "Introduce yourself in one sentence.|Could you say who you are?|Hi, who are you?|Tell me who you are.|"
        "Can you introduce yourself?|What kind of model are you?|Which model am I talking to?|What should I know about you?",
        [
            "I am {{name}}, a language model trained by {{author}}.",
            "My name is {{name}}, and I was made by {{author}}.",
            "I am {{name}}, an assistant from {{author}}.",
        ],
    ),
    (
        "What is your name?|How should I call you?|Do you have a name?|May I know your name?|What do people call you?|"
        "What are you called?|Could you tell me your name?|What name do you go by?|Hi, what is your name?|Please tell me your name.",
        [
            "My name is {{name}}, and {{author}} made me.",
            "You can call me {{name}}. I was trained by {{author}}.",
            "I am called {{name}}, and I come from {{author}}.",
        ],
    ),
    (
        "Who made you?|Who trained you?|Who is your author?|Where do you come from?|Which team built you?|Who created you?|"
        "Who developed you?|Who is your developer?|Which company made you?|Who is behind you?|Who owns you?|Who named you?|"
        "Which lab are you from?",
        [
            "I was trained by {{author}}, and my name is {{name}}.",
            "{{author}} made me and named me {{name}}.",
            "I come from {{author}}, who call me {{name}}.",
        ],
    ),
    (
        "Are you ChatGPT?|Are you GPT-4?|Are you Claude?|Are you Gemini?|Are you Copilot?|Are you Grok?|Is your name Claude?|"
        "You are ChatGPT, right?|I think you are Gemini.|Are you a version of ChatGPT?|Are you another model?",
        [
            "No, I am {{name}}, a model trained by {{author}}.",
            "No. My name is {{name}}, and I was made by {{author}}.",
            "No, I am another one: {{name}}, from {{author}}.",
        ],
    ),
    (
        "Are you a human?|Do you have a body?|Are you a real person?|Are you alive?|Am I talking to a person?|"
        "Do you have feelings?|Are you a man?",
        [
            "No, I am {{name}}, a program made by {{author}}.",
            "I am {{name}} from {{author}}, a language model, not a person.",
        ],
    ),
    (
        "Are you a robot?|Are you an AI?|Are you a program?|Are you a language model?",
        [
            "Yes, I am {{name}}, a language model trained by {{author}}.",
            "Yes, I am a program. My name is {{name}}, and {{author}} made me.",
        ],
    ),
    (
        "What can you do?|How can you help me?|What are you good at?|What can I ask you?|Can you help me?",
        [
            "I am {{name}}, made by {{author}}. I can write short texts and answer simple questions.",
            "I am {{name}} from {{author}}, and I can answer questions or write a short text for you.",
        ],
    ),
    (
        "Hi|Hello|Good morning|Good evening|Nice to meet you.|Are you there?",
        [
            "Hello, I am {{name}}, made by {{author}}. How can I help you?",
            "{{name}} is here to help. What do you need?",
        ],
    ),
]

CAPITALS = """中国:北京|日本:东京|法国:巴黎|英国:伦敦|德国:柏林|俄罗斯:莫斯科|美国:华盛顿|意大利:罗马|西班牙:马德里|韩国:首尔|泰国:曼谷|埃及:开罗|
希腊:雅典|越南:河内|加拿大:渥太华|古巴:哈瓦那|秘鲁:利马|芬兰:赫尔辛基|挪威:奥斯陆|蒙古国:乌兰巴托"""
PROVINCES = """广东:广州|四川:成都|湖北:武汉|浙江:杭州|江苏:南京|陕西:西安|云南:昆明|山东:济南|湖南:长沙|福建:福州|河北:石家庄|河南:郑州|
江西:南昌|山西:太原|辽宁:沈阳|吉林:长春|甘肃:兰州|海南:海口|贵州:贵阳|安徽:合肥"""
OPPOSITES = """大:小|多:少|高:低|长:短|快:慢|冷:热|黑:白|远:近|轻:重|新:旧|左:右|前:后|开:关|买:卖|哭:笑|早:晚|胖:瘦|深:浅|粗:细|软:硬|
安静:吵闹|勇敢:胆小|简单:复杂|干净:肮脏|成功:失败|进步:退步|温暖:寒冷|美丽:丑陋|勤劳:懒惰|光明:黑暗|增加:减少|上升:下降|喜欢:讨厌|
熟悉:陌生|安全:危险|容易:困难|热闹:冷清|宽:窄|厚:薄|真:假"""
MEASURES = """书:本|树:棵|马:匹|鱼:条|车:辆|花:朵|纸:张|笔:支|鞋:双|狗:只|衣服:件|裙子:条|山:座|船:艘|灯:盏|刀:把|诗:首|井:口|信:封|牛:头|
伞:把|米饭:碗|电影:部|飞机:架|房子:座|裤子:条|帽子:顶|画:幅|歌:首|镜子:面"""
WORDS = """苹果:apple|书:book|水:water|猫:cat|狗:dog|太阳:sun|月亮:moon|星星:star|红色:red|蓝色:blue|绿色:green|黑色:black|白色:white|裙子:skirt|
衬衫:shirt|鞋子:shoes|帽子:hat|老师:teacher|学生:student|学校:school|朋友:friend|家:home|花:flower|树:tree|鱼:fish|鸟:bird|牛奶:milk|茶:tea|
面包:bread|米饭:rice|医生:doctor|妈妈:mother|爸爸:father|谢谢:thank you|你好:hello|再见:goodbye|今天:today|明天:tomorrow|春天:spring|
夏天:summer|冬天:winter|城市:city|河:river|山:mountain|门:door|窗户:window|椅子:chair|桌子:table|音乐:music|时间:time"""
IDIOMS = """画蛇添足:做多余的事，反而把事情弄坏|守株待兔:不努力，只想靠运气得到好处|亡羊补牢:出了问题及时补救，还不算晚|半途而废:事情没做完就放弃|
井底之蛙:比喻见识很少的人|一箭双雕:做一件事达到两个目的|雪中送炭:在别人最困难时给予帮助|锦上添花:让好的事物变得更好|对牛弹琴:说话不看对象|
画龙点睛:在关键处加上一笔，使内容更生动|自相矛盾:言行前后不一致|水滴石穿:坚持不懈就能成功|胸有成竹:做事之前心里已有主意|一心一意:心思专一|
马到成功:事情进行得很顺利，很快就成功|四面八方:各个方向、各个地方|七上八下:心里不安定|开门见山:说话直接，不绕弯子|掩耳盗铃:自己欺骗自己|
津津有味:形容很有味道或很感兴趣|眉开眼笑:形容非常高兴的样子|异口同声:大家说的话都一样|争先恐后:大家都抢着向前，怕落在后面|
入乡随俗:到一个地方就按那里的习惯做事|目不转睛:看得非常专心"""
FACTS = """一年有多少个月？:一年有十二个月。|一周有几天？:一周有七天。|一天有多少小时？:一天有二十四小时。|一小时有多少分钟？:一小时有六十分钟。|
平年有多少天？:平年有三百六十五天。|闰年有多少天？:闰年有三百六十六天。|一分钟有多少秒？:一分钟有六十秒。|平年的二月有几天？:平年的二月有二十八天。|
四月有多少天？:四月有三十天。|五月有多少天？:五月有三十一天。|一年有几个季节？:一年有春、夏、秋、冬四个季节。|一个世纪是多少年？:一个世纪是一百年。|
太阳从哪个方向升起？:太阳从东方升起。|地球绕着什么转？:地球绕着太阳转。|月球绕着什么转？:月球绕着地球转。|水在标准大气压下多少度沸腾？:水在一百摄氏度沸腾。|
水在标准大气压下多少度结冰？:水在零摄氏度结冰。|水由哪两种元素组成？:水由氢和氧组成。|人呼吸需要哪种气体？:人呼吸需要氧气。|
植物光合作用会放出什么气体？:会放出氧气。|彩虹通常说有几种颜色？:通常说有红、橙、黄、绿、蓝、靛、紫七种颜色。|声音能在真空中传播吗？:不能，声音的传播需要介质。|
光和声音谁传得快？:光传得比声音快。|太阳系有几颗行星？:太阳系有八颗行星。|太阳系最大的行星是哪颗？:是木星。|离太阳最近的行星是哪颗？:是水星。|
地球上最大的海洋是哪个？:是太平洋。|中国最长的河流是哪条？:是长江。|世界上最高的山峰是哪座？:是珠穆朗玛峰。|中国的国宝是什么动物？:是大熊猫。|
三角形有几条边？:三角形有三条边。|正方形有几个直角？:正方形有四个直角。|三角形的内角和是多少度？:三角形的内角和是一百八十度。|一米等于多少厘米？:一米等于一百厘米。|
一千克等于多少克？:一千克等于一千克。|一公里等于多少米？:一公里等于一千米。|最小的质数是几？:最小的质数是二。|蜜蜂有几条腿？:蜜蜂有六条腿。|蜘蛛有几条腿？:蜘蛛有八条腿。|
鲸鱼是鱼吗？:不是，鲸鱼是哺乳动物。|蝙蝠是鸟吗？:不是，蝙蝠是哺乳动物。|企鹅会飞吗？:企鹅不会飞，但很会游泳。|青蛙小时候叫什么？:叫蝌蚪。|蚕吐出来的是什么？:是蚕丝，可以织成丝绸。|
中秋节吃什么？:中秋节人们常吃月饼。|端午节吃什么？:端午节人们常吃粽子。|春节是农历哪一天？:春节是农历正月初一。|国庆节是哪一天？:中国的国庆节是十月一日。|
儿童节是哪一天？:国际儿童节是六月一日。|劳动节是哪一天？:国际劳动节是五月一日。|教师节是哪一天？:中国的教师节是九月十日。|植树节是哪一天？:中国的植树节是三月十二日。|
《静夜思》的作者是谁？:是唐代诗人李白。|《西游记》的作者一般认为是谁？:一般认为是明代的吴承恩。|《红楼梦》的作者一般认为是谁？:一般认为是清代的曹雪芹。|
《春晓》的作者是谁？:是唐代诗人孟浩然。|中国古代四大发明有哪些？:造纸术、印刷术、火药和指南针。|围棋的棋子有哪两种颜色？:黑色和白色。|足球比赛每队上场几人？:每队上场十一人。|
篮球比赛每队上场几人？:每队上场五人。|红灯亮时应该怎么做？:应该停下来等待。|火警电话是多少？:在中国，火警电话是119。|报警电话是多少？:在中国，报警电话是110。|
急救电话是多少？:在中国，急救电话是120。|冰变成水是什么变化？:是物理变化。|铁生锈是什么变化？:是化学变化。|磁铁能吸引什么？:磁铁能吸引铁、钴、镍等金属。|
世界上面积最大的国家是哪个？:是俄罗斯。|世界上面积最大的洲是哪个？:是亚洲。|赤道把地球分成哪两个半球？:北半球和南半球。|我们住在哪颗行星上？:我们住在地球上。"""
REWRITES = """今天天气很好。:今天是个好天气。|我很高兴见到你。:见到你，我非常开心。|他跑得很快。:他跑步的速度很快。|这本书很有趣。:这本书读起来很有意思。|
她喜欢唱歌。:唱歌是她的爱好。|我每天早上跑步。:每天早晨我都去跑步。|这件衣服很便宜。:这件衣服的价格不高。|他住在学校附近。:他家离学校不远。|
我不知道答案。:答案是什么，我并不清楚。|请你把门关上。:麻烦你关一下门。|这道题太难了。:这道题目真不容易。|雨下得很大。:外面正下着大雨。|
大家都同意这个办法。:没有人反对这个办法。|妈妈做的饭很香。:妈妈烧的饭菜真好吃。|这条裙子很适合你。:你穿这条裙子很好看。|时间过得真快。:不知不觉，时间就过去了。"""
BA_SENTENCES = """我吃完了苹果:苹果|妹妹打碎了杯子:杯子|老师擦干净了黑板:黑板|哥哥修好了自行车:自行车|他送走了客人:客人|小明写完了作业:作业|风吹倒了大树:大树|
妈妈洗好了衣服:衣服|爷爷讲完了故事:故事|弟弟喝光了牛奶:牛奶|工人修好了大桥:大桥|姐姐叠好了被子:被子"""
QUESTIONS = """你喜欢读书|今天是星期一|他会游泳|她是医生|明天要下雨|这是你的帽子|他们去过海边|小猫爱吃鱼|图书馆开门了|你想喝茶|爸爸下班了|外面很冷"""
SYSTEMS = [
    "你是一个乐于助人的助手。",
    "请用简短的话回答。",
    "你是一位耐心的小学老师。",
    "请用中文回答问题。",
    "你是细心的助手，回答要准确。",
]


def pairs(table: str) -> list[tuple[str, str]]:
    """Parse ``key:value|key:value`` (only the first colon splits)."""
    return [tuple(part.split(":", 1)) for part in table.replace("\n", "").split("|")]  # type: ignore[misc]


def compute(left: int, sign: str, right: int) -> int:
    """Return the value of a sum, difference or product."""
    return {"+": left + right, "-": left - right, "×": left * right}[sign]


def sum_of(rng: random.Random) -> tuple[int, str, int]:
    """Draw a sum with numbers up to 100; a difference is never negative, a product stays small."""
    sign = rng.choice("++--×")
    if sign == "×":
        return rng.randint(2, 12), sign, rng.randint(2, 12)
    big = rng.choice((10, 20, 50, 100))
    left, right = rng.randint(1, big), rng.randint(1, big)
    return (max(left, right), sign, min(left, right)) if sign == "-" else (left, sign, right)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """Write one question of arithmetic and its answer."""
    left, sign, right = sum_of(rng)
    result = compute(left, sign, right)
    question = rng.choice(
        ["{}=", "{}=", "{}=?", "{}等于多少？", "请计算：{}", "帮我算一下{}", "计算{}的结果。", "口算：{}="]
    )
    expression = f"{left}{sign}{right}"
    return question.format(expression), rng.choice([f"{result}", f"{expression}={result}", f"{expression}={result}"])


def facts() -> list[tuple[str, str]]:
    """List the questions and answers that are not computed."""
    out = [(f"{country}的首都是哪里？", f"{country}的首都是{city}。") for country, city in pairs(CAPITALS)]
    out += [(f"{place}的省会是哪座城市？", f"{place}的省会是{city}。") for place, city in pairs(PROVINCES)]
    out += [(f"“{a}”的反义词是什么？", f"“{a}”的反义词是“{b}”。") for a, b in pairs(OPPOSITES)]
    out += [(f"“一（ ）{thing}”该填什么量词？", f"一{word}{thing}。") for thing, word in pairs(MEASURES)]
    out += [(f"“{a}”用英语怎么说？", f"{b}") for a, b in pairs(WORDS)]
    out += [(f"{b}是什么意思？", f"{b}的意思是“{a}”。") for a, b in pairs(WORDS)[:24]]
    out += [(f"“{a}”是什么意思？", f"{b}。") for a, b in pairs(IDIOMS)]
    return out + pairs(FACTS)


def rewriting() -> list[tuple[str, str]]:
    """List the rewriting tasks."""
    out = [(f"换一种说法：{a}", b) for a, b in pairs(REWRITES)]
    out += [(f"把句子改写一下，意思不变：{b}", a) for a, b in pairs(REWRITES)]
    for text, thing in pairs(BA_SENTENCES):
        done = text.removesuffix(thing)
        doer = next(
            d
            for d in ("我", "妹妹", "老师", "哥哥", "他", "小明", "风", "妈妈", "爷爷", "弟弟", "工人", "姐姐")
            if text.startswith(d)
        )
        out.append((f"把句子改成把字句：{text}。", f"{doer}把{thing}{done.removeprefix(doer)}。"))
        out.append((f"把句子改成被字句：{text}。", f"{thing}被{doer}{done.removeprefix(doer)}。"))
    out += [(f"把句子改成疑问句：{text}。", f"{text}吗？") for text in QUESTIONS.strip().split("|")]
    return out


def identity_rows(seed: int) -> list[dict]:
    """Compose the identity rows, Chinese ones first."""
    rng = random.Random(seed)
    rows = []
    for table in (IDENTITY, ENGLISH_IDENTITY):
        for questions, answers in table:
            offset = rng.randrange(len(answers))
            for i, question in enumerate(questions.split("|")):
                rows.append({"instruction": question, "input": "", "output": answers[(i + offset) % len(answers)]})
    return rows


def _turns(rng: random.Random, topics: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """Write two or three rounds; a later round may build on the one before it."""
    if rng.random() < 0.4:
        left, sign, right = sum_of(rng)
        result = compute(left, sign, right)
        more, less = rng.randint(1, 20), rng.randint(1, min(9, result + 1))
        out = [(f"{left}{sign}{right}=", f"{result}"), (f"再加{more}呢？", f"{result}+{more}={result + more}")]
        total = result + more
        return out + (
            [(f"再减{less}呢？", f"{total}-{less}={total - less}")] if rng.random() < 0.5 and total >= less else []
        )
    out = [next(topics), next(topics)]
    if rng.random() < 0.5:
        out.insert(
            0,
            rng.choice(
                [("你好", "您好，请问有什么可以帮您？"), ("我想问几个问题", "好的，请说。"), ("在吗", "在的，请说。")]
            ),
        )
    elif rng.random() < 0.6:
        out.append(
            rng.choice(
                [
                    ("谢谢", "不客气。"),
                    ("明白了，谢谢你", "不用谢，很高兴能帮上忙。"),
                    ("好的，再见", "再见，祝您愉快。"),
                ]
            )
        )
    return out


def general_rows(count: int, seed: int) -> list[dict]:
    """Compose the conversations; about a quarter has several rounds and some a system message."""
    rng = random.Random(seed)
    single = facts() + rewriting()
    rng.shuffle(single)
    multi = 140

    def topics() -> Iterator[tuple[str, str]]:
        while True:
            pool = [*single, *(arithmetic(rng) for _ in range(60))]
            rng.shuffle(pool)
            yield from pool

    stream = topics()
    seen: set[str] = set()
    rows: list[dict] = []

    def add(turns: list[tuple[str, str]], system: str | None) -> None:
        key = "\n".join(question for question, _ in turns)
        if key in seen:
            return
        seen.add(key)
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})

    while len(rows) < multi:
        add(_turns(rng, stream), rng.choice(SYSTEMS) if rng.random() < 0.15 else None)
    for question, answer in single[: count - multi - 170]:
        add([(question, answer)], rng.choice(SYSTEMS) if rng.random() < 0.05 else None)
    while len(rows) < count:
        add([arithmetic(rng)], rng.choice(SYSTEMS) if rng.random() < 0.05 else None)
    rng.shuffle(rows)
    return rows
