// The page of eval.py rate: two answers to a prompt, four criteria for each, and which one is preferred.

const SIDES = { left: "A", right: "B" };
const PREFERENCES = [
  { value: "left", label: "Answer A", key: "a" },
  { value: "right", label: "Answer B", key: "b" },
  { value: "tie", label: "No preference", key: "n" },
];
let swapped = new Set();  // ids of the items that this rater sees with left and right exchanged

const labelName = (item, side, criterion) => `${item.id} ${side} ${criterion.name}`;
const preferenceName = item => `${item.id} preference`;
const noteName = item => `${item.id} note`;

const questions = item => [
  ...Object.keys(SIDES).flatMap(side => DATA.criteria.map(criterion => labelName(item, side, criterion))),
  preferenceName(item),
];

function drawSides(random) {
  swapped = new Set(DATA.items.filter(() => random() < 0.5).map(item => item.id));
}

function showItem(item, parent) {
  const properties = lang => Object.assign({ className: "text", dir: "auto" }, lang && { lang });
  const [langOfPrompt, ...langs] = item.langs || [];  // where they are not the page's
  element("h3", parent, "Prompt");
  element("div", parent, item.prompt, properties(langOfPrompt));
  const answers = element("div", parent, "", { className: "side-by-side" });
  const texts = swapped.has(item.id) ? [...item.answers].reverse() : item.answers;
  if (swapped.has(item.id)) langs.reverse();
  Object.entries(SIDES).forEach(([side, letter], i) => {
    const article = element("article", answers);
    element("h3", article, `Answer ${letter}`, { id: `heading-${side}` });
    article.setAttribute("aria-labelledby", `heading-${side}`);
    if (texts[i]) element("div", article, texts[i], properties(langs[i]));
    else element("div", article, "(The answer is empty.)", { className: "soft" });
    for (const criterion of DATA.criteria) {
      choice(article, criterion.title, `of answer ${letter}`, labelName(item, side, criterion), criterion.options);
    }
  });
  choice(parent, "Which answer do you prefer?", "", preferenceName(item), PREFERENCES);
  note(parent, "Note (optional), such as the strategy that you recognise", noteName(item));
}

// What eval.py agreement reads. Beside it the time of each entry, which decides when a file is loaded here again.
function toFile(entries) {
  const content = { swapped: [...swapped], ratings: [], preferences: [], notes: [] };
  for (const item of DATA.items) {
    const add = (list, name, fields) => {
      const { value = null, time } = entries[name] || {};
      if (value !== null) list.push({ item: item.id, ...fields, value, time });
    };
    for (const side of Object.keys(SIDES)) {
      for (const criterion of DATA.criteria) {
        add(content.ratings, labelName(item, side, criterion), { side, criterion: criterion.name });
      }
    }
    add(content.preferences, preferenceName(item), {});
    add(content.notes, noteName(item), {});
  }
  return content;
}

function fromFile(content) {
  const items = new Map(DATA.items.map(item => [item.id, item]));
  const criteria = new Map(DATA.criteria.map(criterion => [criterion.name, criterion]));
  const isListOfObjects = list => Array.isArray(list) && list.every(one => one && Object(one) === one);
  const refuse = () => { throw new Error("an answer in it is none of this page"); };
  const entries = {};
  const add = (name, isAllowed, { value, time }) => {
    if (!isAllowed || !Number.isFinite(time)) refuse();
    entries[name] = { value, time };
  };
  const { ratings, preferences, notes } = content;
  if (![ratings, preferences, notes].every(isListOfObjects)) refuse();
  if (JSON.stringify(content.swapped) !== JSON.stringify([...swapped])) throw new Error("its sides are not this rater's");
  for (const one of ratings) {
    const item = items.get(one.item), criterion = criteria.get(one.criterion);
    if (!item || !criterion || !Object.hasOwn(SIDES, one.side)) refuse();
    add(labelName(item, one.side, criterion), criterion.options.some(({ value }) => value === one.value), one);
  }
  for (const one of preferences) {
    if (!items.has(one.item)) refuse();
    add(preferenceName(items.get(one.item)), PREFERENCES.some(({ value }) => value === one.value), one);
  }
  for (const one of notes) {
    if (!items.has(one.item)) refuse();
    add(noteName(items.get(one.item)), typeof one.value === "string", one);
  }
  return entries;
}

startForm({ questions, begin: drawSides, show: showItem, toFile, fromFile });
