"""Places, offices, hotlines and advice of the snow-alerts data set, in both languages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """``has_blue`` is False where the lowest of the four levels does not exist."""

    en: str
    zh: str
    office_en: str
    office_zh: str
    hotlines: tuple[str, ...]
    has_blue: bool = True


_CITIES = (
    ("Nanjing", "南京市", (("Jianye District", "建邺区"), ("Pukou District", "浦口区"), ("Lishui District", "溧水区"))),
    (
        "Harbin",
        "哈尔滨市",
        (("Daoli District", "道里区"), ("Songbei District", "松北区"), ("Acheng District", "阿城区")),
    ),
    ("Changchun", "长春市", (("Chaoyang District", "朝阳区"), ("Shuangyang District", "双阳区"))),
    ("Shenyang", "沈阳市", (("Heping District", "和平区"), ("Hunnan District", "浑南区"))),
    ("Urumqi", "乌鲁木齐市", (("Tianshan District", "天山区"), ("Midong District", "米东区"))),
    ("Hohhot", "呼和浩特市", (("Saihan District", "赛罕区"), ("Xincheng District", "新城区"))),
    (
        "Beijing",
        "北京市",
        (("Yanqing District", "延庆区"), ("Huairou District", "怀柔区"), ("Haidian District", "海淀区")),
    ),
    ("Zhengzhou", "郑州市", (("Jinshui District", "金水区"), ("Gongyi", "巩义市"))),
    ("Xi'an", "西安市", (("Yanta District", "雁塔区"), ("Lintong District", "临潼区"))),
    ("Wuhan", "武汉市", (("Jiangxia District", "江夏区"), ("Huangpi District", "黄陂区"))),
    ("Changsha", "长沙市", (("Yuelu District", "岳麓区"), ("Liuyang", "浏阳市"))),
    ("Guiyang", "贵阳市", (("Huaxi District", "花溪区"), ("Xiuwen County", "修文县"))),
    ("Hefei", "合肥市", (("Shushan District", "蜀山区"), ("Feixi County", "肥西县"))),
    ("Jinan", "济南市", (("Licheng District", "历城区"), ("Zhangqiu District", "章丘区"))),
    ("Yantai", "烟台市", (("Zhifu District", "芝罘区"), ("Muping District", "牟平区"))),
    ("Lanzhou", "兰州市", (("Chengguan District", "城关区"), ("Yuzhong County", "榆中县"))),
)
_ABROAD = (
    Place("Oslo, Norway", "挪威奥斯陆", "Norwegian Meteorological Institute", "挪威气象研究所", ("112", "175"), False),
    Place("Helsinki, Finland", "芬兰赫尔辛基", "Finnish Meteorological Institute", "芬兰气象研究所", ("112",), False),
    Place("Innsbruck, Austria", "奥地利因斯布鲁克", "GeoSphere Austria", "奥地利地球圈研究所", ("112", "140"), False),
    Place("Montreal, Canada", "加拿大蒙特利尔", "Environment Canada", "加拿大环境部", ("511", "911"), False),
)
PLACES = (
    *(
        Place(f"{en}, {city_en}", zh, f"{city_en} Meteorological Observatory", f"{city_zh}气象台", ("12121", "12345"))
        for city_en, city_zh, districts in _CITIES
        for en, zh in districts
    ),
    *_ABROAD,
)

LEVELS = {"I": ("red", "红色"), "II": ("orange", "橙色"), "III": ("yellow", "黄色"), "IV": ("blue", "蓝色")}

ADVICE = {
    "snow": (
        ("stay indoors if you can", "尽量减少外出"),
        ("clear snow from roofs and sheds", "及时清扫屋顶和棚架积雪"),
        ("drive slowly and keep your distance", "驾车减速慢行，保持车距"),
        ("keep away from trees and billboards", "远离树木和广告牌"),
        ("bring farm animals under shelter", "将牲畜转移到棚圈"),
        ("check on older neighbours", "关心身边的老人"),
    ),
    "ice": (
        ("take the bus or the metro", "尽量乘坐公共交通工具"),
        ("fit snow chains before you drive", "驾车前安装防滑链"),
        ("do not brake or turn suddenly", "不要急刹车或急转弯"),
        ("wear shoes that do not slip", "外出穿防滑鞋"),
        ("keep off bridges and ramps", "避开桥面和匝道"),
        ("walk slowly and do not run", "行走放慢脚步，不要奔跑"),
    ),
    "cold": (
        ("wrap water pipes and meters", "给水管和水表保温"),
        ("wear warm clothes outdoors", "外出注意添衣保暖"),
        ("air rooms that are heated with coal", "燃煤取暖注意通风"),
        ("cover crops and greenhouses", "做好农作物和大棚防冻"),
        ("keep children and older people warm", "老人和儿童注意保暖"),
        ("charge phones and torches", "提前为手机和手电充电"),
    ),
}
