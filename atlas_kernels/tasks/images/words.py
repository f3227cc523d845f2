"""Class names as words for a prompt, made of what the files of a data set call its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(classes: Sequence[str]) -> tuple[str, ...]:
    """``_`` and ``/`` become spaces."""
    return tuple(re.sub("[_/]", " ", name) for name in classes)


def numbered(classes: Sequence[str]) -> tuple[str, ...]:
    """``017.Cardinal_bird`` is "Cardinal bird"; without a number as `plain`."""
    return plain([re.sub(r"^\d+\.", "", name) for name in classes])


def joined(classes: Sequence[str]) -> tuple[str, ...]:
    """``IceDancing`` is "Ice Dancing"."""
    return plain([re.sub("(?<=[a-z])(?=[A-Z])", " ", name) for name in classes])


def caltech256(classes: Sequence[str]) -> tuple[str, ...]:
    """``251.airplanes-101`` is "airplanes": the ending names a class of Caltech-101."""
    return tuple(re.sub("-101$", "", name).replace("-", " ") for name in numbered(classes))


def first(classes: Sequence[str]) -> tuple[str, ...]:
    """``7 - seven`` is "7"."""
    return tuple(name.split(" ")[0] for name in classes)


def eurosat(classes: Sequence[str]) -> tuple[str, ...]:
    """Land cover in the words that a caption would use."""
    return joined([_LAND.get(name, name) for name in classes])


def pascalvoc(classes: Sequence[str]) -> tuple[str, ...]:
    """``pottedplant`` is "potted plant"."""
    return plain([_VOC.get(name, name) for name in classes])


def traffic_signs(classes: Sequence[str]) -> tuple[str, ...]:
    """The signs of GTSRB by number, ``00014`` or ``14`` being "stop"."""
    return tuple(
        _SIGNS[int(name)] if name.isdigit() else word
        for name, word in zip(classes, plain(classes), strict=True)
    )


def countries(classes: Sequence[str]) -> tuple[str, ...]:
    """Two letters of ISO 3166 as the country's name."""
    names = dict(entry.strip().split(" ", 1) for entry in _COUNTRIES.split(";"))
    return tuple(names.get(name, name) for name in plain(classes))


def imagenet(classes: Sequence[str]) -> tuple[str, ...]:
    """The thousand classes in the order of their sorted WordNet ids, as open_clip names them.

    Raises:
        ValueError: other folders than the thousand WordNet ids.
    """
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        raise ValueError(
            f"found {len(classes)} classes, such as {classes[0]!r}: expected the 1000 WordNet ids "
            "of ImageNet (n01440764, ...), or the names of your classes in classnames.txt"
        )
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


_LAND = {
    "AnnualCrop": "annual crop land",
    "HerbaceousVegetation": "herbaceous vegetation",
    "Forest": "forest",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "lake or sea",
}

_VOC = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}

_SIGNS = (
    "speed limit of 20 km/h",
    "speed limit of 30 km/h",
    "speed limit of 50 km/h",
    "speed limit of 60 km/h",
    "speed limit of 70 km/h",
    "speed limit of 80 km/h",
    "end of the speed limit of 80 km/h",
    "speed limit of 100 km/h",
    "speed limit of 120 km/h",
    "no overtaking",
    "no overtaking by trucks",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general danger",
    "curve to the left",
    "curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "ice or snow",
    "wild animals crossing",
    "end of all limits",
    "turn right ahead",
    "turn left ahead",
    "straight ahead only",
    "straight ahead or right",
    "straight ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking by trucks",
)

_COUNTRIES = """AD Andorra; AE United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda;
AI Anguilla; AL Albania; AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AT Austria;
AU Australia; AW Aruba; AX Aland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados;
BD Bangladesh; BE Belgium; BF Burkina Faso; BG Bulgaria; BH Bahrain; BJ Benin; BM Bermuda;
BN Brunei; BO Bolivia; BQ Bonaire; BR Brazil; BS Bahamas; BT Bhutan; BW Botswana; BY Belarus;
BZ Belize; CA Canada; CD DR Congo; CF Central African Republic; CH Switzerland; CI Ivory Coast;
CK Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba;
CV Cape Verde; CW Curacao; CY Cyprus; CZ Czech Republic; DE Germany; DK Denmark; DM Dominica;
DO Dominican Republic; DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; ES Spain; ET Ethiopia;
FI Finland; FJ Fiji; FK Falkland Islands; FO Faroe Islands; FR France; GA Gabon;
GB United Kingdom; GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar;
GL Greenland; GM Gambia; GP Guadeloupe; GR Greece; GS South Georgia; GT Guatemala; GU Guam;
GY Guyana; HK Hong Kong; HN Honduras; HR Croatia; HT Haiti; HU Hungary; ID Indonesia; IE Ireland;
IL Israel; IM Isle of Man; IN India; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey;
JM Jamaica; JO Jordan; JP Japan; KE Kenya; KG Kyrgyzstan; KH Cambodia; KN Saint Kitts and Nevis;
KP North Korea; KR South Korea; KW Kuwait; KY Cayman Islands; KZ Kazakhstan; LA Laos; LB Lebanon;
LC Saint Lucia; LI Liechtenstein; LK Sri Lanka; LR Liberia; LT Lithuania; LU Luxembourg;
LV Latvia; LY Libya; MA Morocco; MC Monaco; MD Moldova; ME Montenegro; MF Saint Martin;
MG Madagascar; MK North Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macau; MQ Martinique;
MR Mauritania; MT Malta; MU Mauritius; MV Maldives; MW Malawi; MX Mexico; MY Malaysia;
MZ Mozambique; NA Namibia; NC New Caledonia; NG Nigeria; NI Nicaragua; NL Netherlands; NO Norway;
NP Nepal; NZ New Zealand; OM Oman; PA Panama; PE Peru; PF French Polynesia; PG Papua New Guinea;
PH Philippines; PK Pakistan; PL Poland; PR Puerto Rico; PS Palestine; PT Portugal; PW Palau;
PY Paraguay; QA Qatar; RE Reunion; RO Romania; RS Serbia; RU Russia; RW Rwanda; SA Saudi Arabia;
SB Solomon Islands; SC Seychelles; SD Sudan; SE Sweden; SG Singapore; SH Saint Helena;
SI Slovenia; SJ Svalbard; SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal; SO Somalia;
SS South Sudan; SV El Salvador; SX Sint Maarten; SY Syria; SZ Eswatini; TG Togo; TH Thailand;
TJ Tajikistan; TL East Timor; TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey;
TT Trinidad and Tobago; TW Taiwan; TZ Tanzania; UA Ukraine; UG Uganda; US United States;
UY Uruguay; UZ Uzbekistan; VA Vatican; VE Venezuela; VG British Virgin Islands;
VI US Virgin Islands; VN Vietnam; VU Vanuatu; WS Samoa; XK Kosovo; YE Yemen; ZA South Africa;
ZM Zambia; ZW Zimbabwe"""
