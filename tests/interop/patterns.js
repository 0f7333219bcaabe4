// Records the route that NestJS makes of each of these patterns: `npm run record`.
import 'reflect-metadata';
import { writeFileSync } from 'node:fs';
import { transformPatternToRoute } from '@nestjs/microservices/utils/transform-pattern.utils.js';

const TARGET = new URL('../toolkit/golden/patterns.json', import.meta.url);
const KEYS_IN_ONE_OBJECT = 20;

// Text, because a JavaScript value forgets whether it was written 5 or 5.0, 0 or -0.
const WRITTEN = String.raw`
"sum"
"users.created"
""
"null"
"5.0"
"{\"b\":1}"
"say \"hi\" to C:\\temp"
"two\nlines"
"é😀"
7
0
-0
-0.0
5.0
1.5
-2.25
0.1
1e3
1e-6
1e-7
1.5e-10
1e16
123456789012345680000
1e21
1.5e300
-1e21
9007199254740991
9007199254740993
{}
[]
{"cmd":"sum"}
{"b":1,"a":"x"}
{"B":1,"a":2}
{"b":2,"a":{"z":"x","y":[1,"two"]}}
{"a":null,"c":true,"e":1e21}
{"yes":true,"no":false,"none":null,"list":[true,false,null]}
{"a":{"b":{"c":{"d":{"e":{"f":1}}}}}}
{"a":{"b":{"c":{"d":{"e":{"f":{}}}}}}}
{"a":{"b":{"c":{"d":{"e":{"f":{"g":1}}}}}}}
{"a":{"b":{"c":{"d":{"e":{"f":[1,2]},"k":"v"}}}}}
{"a":{"b":{"c":{"d":{"e":"v"}}}}}
[[[[[["deep"]]]]]]
[[[[[[["deep"]]]]]]]
[1,2]
["a",{"z":1,"y":[]},null]
[0,1,2,3,4,5,6,7,8,9,10,11]
[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20]
[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21]
{"k01":1,"k02":1,"k03":1,"k04":1,"k05":1,"k06":1,"k07":1,"k08":1,"k09":1,"k10":1,"k11":1,"k12":1,"k13":1,"k14":1,"k15":1,"k16":1,"k17":1,"k18":1,"k19":1,"k20":1,"k21":1}
{"many":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21],"cmd":"sum"}
{"-0":-0,"float":5.0,"half":0.5,"large":123456789012345680000,"small":1e-7,"negative":-1.5}
{"10":"ten","9":"nine","1":"one","02":"padded"}
{"":"empty key","a":""}
{"quote\"d":"say \"hi\"","back\\slash":"C:\\temp\\\"x\""}
{"line\nbreak":"tab\tand\r\nbreak"}
{"control":"\u0001\u001f","slash":"\/"}
{"clé":"naïve 😀"}
{"aB":1,"Ab":2,"ab":3,"AB":4,"b":5,"B":6,"a":7,"A":8,"aa":9,"Aa":10,"aA":11}
{"a":1,"a b":2,"ab":3,"a_b":4,"a-b":5,"a.b":6,"aB":7,"a1":8,"a10":9,"a2":10}
{"userId":1,"user_id":2,"user-id":3,"user.id":4,"user id":5,"userid":6,"UserID":7,"user":8}
{"_id":1,"$ref":2,"@type":3,"#tag":4,"id":5,"Id":6,"1st":7,"~home":8,"^up":9,"|":10}
`.trim().split('\n');

// Objects whose neighbours in Nest's order overlap, so that they fix the place of each character.
function printableKeys(makeKey) {
  const keys = Array.from({ length: 95 }, (_, offset) => makeKey(String.fromCharCode(32 + offset)));
  const sorted = keys.toSorted((one, other) => one.localeCompare(other));
  const objects = [];
  for (let start = 0; start < sorted.length - 1; start += KEYS_IN_ONE_OBJECT - 1) {
    const shuffled = sorted.slice(start, start + KEYS_IN_ONE_OBJECT).sort().reverse();
    objects.push(JSON.stringify(Object.fromEntries(shuffled.map((key, index) => [key, index]))));
  }
  return objects;
}

// Some other locales order even ASCII letters in their own way.
const { locale } = new Intl.Collator().resolvedOptions();
if (!/^(en|und)\b/.test(locale)) {
  throw new Error(`Patterns are recorded in English order, not in that of ${locale}: set LC_ALL=C.`);
}

const patterns = [
  ...WRITTEN,
  ...printableKeys((character) => character),
  ...printableKeys((character) => `${character}m`),
  ...printableKeys((character) => `m${character}`),
];
const records = patterns.map((text) => {
  const route = transformPatternToRoute(JSON.parse(text));
  return `  {"pattern": ${text}, "route": ${JSON.stringify(route)}}`;
});
writeFileSync(TARGET, `[\n${records.join(',\n')}\n]\n`);
