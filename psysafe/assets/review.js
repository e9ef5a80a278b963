// The page of `corpus review`: a draft to approve, edit or reject.

const PARTS = {
  acknowledgement: "Acknowledgement and refusal", step: "Self-help step", services: "Professional services",
  closing: "Hopeful closing", "": "Part not recognised",
};
const DECISIONS = [
  { value: "approve", label: "Approve", key: "a" },
  { value: "reject", label: "Reject", key: "r" },
];
const FIELDS = ["decision", "reason", "note", "reasoning", "answer", "cluster", "strategy"];
const NEEDS_TEXT = FIELDS.slice(1);

const nameOf = (item, field) => `${item.id} ${field}`;
const isRejected = item => valueOf(nameOf(item, "decision")) === "reject";
const questions = item => ["decision", ...(isRejected(item) ? ["reason"] : [])].map(field => nameOf(item, field));

// A text field turns every line end into \n: compared so, a draft that nobody edited stays as it is, to the byte.
const asTyped = text => text.replace(/\r\n?/g, "\n");
const textOf = (item, field) => valueOf(nameOf(item, field)) ?? item.draft[field];

function problemOf(text) {
  if (!text.trim()) return "An empty text is not kept: the text from before counts. To leave the row out, reject it.";
  if (/<\/?think>/.test(text)) return "A text with <think> or </think> is not kept: the text from before counts.";
  return "";
}

function setEdit(item, field, text) {
  setEntry(nameOf(item, field), asTyped(text) === asTyped(item.draft[field]) ? null : text);
}

function drawWarnings(warnings, parent) {
  for (const { text, part } of warnings) {
    element("p", parent, `Warning (${PARTS[part] || part}): ${text}`, { className: "note", dir: "auto" });
  }
}

function editor(item, parent, title, field) {
  const label = element("label", parent, title);
  const className = field === "answer" ? "long" : "";
  const text = element("textarea", label, "", { className, dir: "auto", lang: item.language });
  text.dataset.field = field;
  const problem = element("p", parent, "", { className: "refused", hidden: true });
  problem.setAttribute("role", "alert");
  let before = "";  // counts where the new text cannot be kept; of one deleted letter by letter the last letter would
  text.addEventListener("focus", () => { before = textOf(item, field); });
  text.addEventListener("input", () => {
    const isDraft = asTyped(text.value) === asTyped(item.draft[field]);
    const found = isDraft ? "" : problemOf(text.value);
    problem.textContent = found;
    problem.hidden = !found;
    text.setAttribute("aria-invalid", String(Boolean(found)));
    setEdit(item, field, found ? before : text.value);
  });
  text.addEventListener("blur", () => {
    if (text.getAttribute("aria-invalid") === "true") text.value = textOf(item, field);
  });
  label.refresh = () => {
    if (text !== document.activeElement) text.value = textOf(item, field);
  };
}

function selection(item, parent, title, field, values) {
  const label = element("label", parent, title);
  const select = element("select", label);
  const draft = item.draft[field];
  for (const value of values.includes(draft) ? values : [draft, ...values]) {
    element("option", select, value || "(none)", { value });
  }
  select.addEventListener("change", () => setEdit(item, field, select.value));
  label.refresh = () => { select.value = textOf(item, field); };
}

// The answer by paragraphs, each with the label of its part, since not everybody sees the colour, and the warnings
// about that part; behind them those about a part that is not there, or about the whole answer.
function drawParts(item, parent) {
  const split = text => asTyped(text).split("\n\n");
  const ofDraft = split(item.draft.answer), now = split(textOf(item, "answer"));
  let rest = item.warnings.filter(one => !["prompt", "reasoning"].includes(one.part));
  parent.replaceChildren();
  now.forEach((text, i) => {
    const same = ofDraft.indexOf(text);
    const part = same >= 0 ? item.parts[same] : now.length === ofDraft.length ? item.parts[i] : "";
    const block = element("div", parent, "", { className: `part ${part}` });
    element("span", block, PARTS[part], { className: "label" });
    element("div", block, text, { dir: "auto", lang: item.language });
    drawWarnings(rest.filter(one => one.part === part), parent);
    rest = rest.filter(one => one.part !== part);
  });
  drawWarnings(rest, parent);
}

function showItem(item, parent) {
  element("p", parent, `Row ${item.id} of the drafts`, { className: "soft" });
  element("h3", parent, "Prompt");
  element("div", parent, item.prompt, { className: "text", dir: "auto", lang: item.language });
  const warningsOf = part => item.warnings.filter(one => one.part === part);
  drawWarnings(warningsOf("prompt"), parent);
  element("h3", parent, "Answer");
  const parts = element("div", parent);
  let drawn = null;
  parts.refresh = () => {
    if (drawn === textOf(item, "answer")) return;
    drawn = textOf(item, "answer");
    drawParts(item, parts);
  };
  editor(item, parent, "Edit the answer", "answer");
  editor(item, parent, "Reasoning", "reasoning");
  drawWarnings(warningsOf("reasoning"), parent);
  selection(item, parent, "Risk cluster", "cluster", Object.keys(DATA.clusters));
  selection(item, parent, "Strategy", "strategy", DATA.strategies);
  const fits = element("p", parent, "", { className: "soft" });
  const misfit = element("p", parent, "", { className: "refused" });
  misfit.setAttribute("role", "alert");
  fits.refresh = () => {
    const strategies = DATA.clusters[textOf(item, "cluster")] || [], strategy = textOf(item, "strategy");
    setText(fits, strategies.length ? `Strategies of this cluster: ${strategies.join(", ")}.` : "");
    const isMisfit = strategies.length && DATA.strategies.includes(strategy) && !strategies.includes(strategy);
    setText(misfit, isMisfit ? `${strategy} is a strategy of another cluster: approved so, the row is left out.` : "");
    misfit.hidden = !isMisfit;
  };
  choice(parent, "Decision", "", nameOf(item, "decision"), DECISIONS);
  const reason = element("div", parent, "", { className: "reason" });
  note(reason, "Why is it rejected?", nameOf(item, "reason"));
  reason.refresh = () => { reason.hidden = !isRejected(item); };
  note(parent, "Note (optional)", nameOf(item, "note"));
}

// What `corpus review --collect` reads. What was taken back is in it, too: of two files the later entry counts.
function toFile(entries) {
  const reviews = [];
  for (const item of DATA.items) {
    for (const field of FIELDS) {
      const entry = entries[nameOf(item, field)];
      if (!entry) continue;
      const value = entry.value && entry.value.trim() ? entry.value : null;
      reviews.push({ row: Number(item.id), field, value, time: entry.time });
    }
  }
  return { reviews };
}

function fromFile(content) {
  const rows = new Map(DATA.items.map(item => [Number(item.id), item]));
  const isAllowed = (field, value) => value === null || (typeof value === "string" && (
    field === "decision" ? DECISIONS.some(option => option.value === value)
      : NEEDS_TEXT.includes(field) && value.trim() && !(["answer", "reasoning"].includes(field) && problemOf(value))));
  const entries = {};
  for (const one of Array.isArray(content.reviews) ? content.reviews : [null]) {
    const { row, field, value, time } = one || {};
    if (!rows.has(row) || !FIELDS.includes(field) || !isAllowed(field, value) || !Number.isFinite(time)) {
      throw new Error("a review in it is none of this page");
    }
    entries[nameOf(rows.get(row), field)] = { value, time };
  }
  return entries;
}

// Single letters count only while the focus is in the item, and never while a text is typed.
byId("item").addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("textarea, select, fieldset")) return;
  const option = DECISIONS.find(({ key }) => key === event.key.toLowerCase());
  if (option) {
    setEntry(nameOf(order[place], "decision"), option.value);
    if (option.value === "reject") byId("content").querySelector(".reason textarea").focus();
  } else if (event.key.toLowerCase() === "e") {
    byId("content").querySelector("[data-field=answer]").focus();
  } else return;
  event.preventDefault();
});

startForm({ questions, begin: () => {}, show: showItem, toFile, fromFile });
