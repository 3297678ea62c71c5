// The script of report.py's page, behind report_workflow.js and report_curves.js. Its data are JSON blocks in the page:
// one about the run (#page), one a trajectory (#tau-0, #tau-1, ...), parsed only when it is looked at. No request.
// Text enters the page as text nodes and attributes alone; nothing is ever parsed as HTML.
"use strict";
const $ = id => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter(child => child != null && child !== false));  // strings become text nodes
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const say = value => value == null ? "" : typeof value === "string" ? value : JSON.stringify(value);
const signed = value => typeof value !== "number" ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const sign = value => value < 0 ? "minus" : "plus";
const mean = values => values.length ? values.reduce((a, b) => a + b) / values.length : null;
const duration = seconds => seconds >= 5400 ? `${number(seconds / 3600)} h`
  : seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${number(seconds)} s`;

function number(value) {  // three significant digits
  if (typeof value !== "number") return say(value) || "–";
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1).replace("e+", "e").replace(/-/g, "−");
  return String(size >= 100 ? Math.round(value) : Number(value.toPrecision(3))).replace("-", "−");
}

// ---- summary -------------------------------------------------------------------------------------------------------
const hundredths = value => number(Math.round(100 * value) / 100);
const TILES = [  // label, keys of summary.json, how to show them
  ["Reward, first and last 10 steps", ["reward_first10", "reward_last10"], hundredths],
  ["Feasible (R_div = 1), last 10 steps", ["feasible_rate_last10"], hundredths],
  ["Held-out accuracy, before and after", ["accuracy_warmstart", "accuracy_trained"], hundredths],
  ["Accuracy of the best fixed workflow", ["accuracy_best_fixed"], hundredths],
  ["Best reachable accuracy", ["accuracy_best_reachable"], hundredths],
  ["Steps", ["steps"], number], ["Trajectories", ["trajectories"], number],
  ["Policy tokens per second", ["tokens_per_second"], number],
  ["Wall time", ["wall_seconds"], duration], ["Seed", ["seed"], number],
];

function showSummary(page) {
  document.title = `${page.name} · FlowSteer run`;
  $("title").append(page.name);
  const nested = Object.values(page.args).filter(value => value && typeof value === "object" && !Array.isArray(value));
  const args = Object.assign({}, ...nested, page.args);
  const about = ["preset", "model", "executor_model", "group_by", "commit"]
    .filter(key => args[key]).map(key => `${key} ${say(args[key]).slice(0, 60)}`);
  if ("executor_url" in args && !(args.executor_url || "").length)
    about.push("simulated executor: answers come from a skill model, not from an LLM");
  $("about").append(about.join(" · "));
  $("notes").append(...page.notes.map(note => h("div", {class: "note"}, note)));
  for (const [label, keys, show] of TILES) {
    const values = keys.map(key => page.summary[key]).filter(value => value != null);
    if (values.length)
      $("tiles").append(h("div", {class: "tile"}, h("b", {}, values.map(show).join(" → ")), h("span", {}, label)));
  }
  const from = page.from_summary ? "summary.json" : "computed from metrics.jsonl";
  for (const [title, facts] of [[from, page.summary], ["args.json", page.args]]) {
    const rows = Object.entries(facts).map(([key, value]) =>
      h("tr", {}, h("td", {class: "soft"}, key), h("td", {}, say(value))));
    if (rows.length) $("facts").append(h("div", {class: "card"}, h("h3", {}, title), h("table", {}, rows)));
  }
}

function showTables(page) {  // an evaluation's rows, by method
  const range = (row, name) => `${number(row[name])} (${number(row.low)}–${number(row.high)})`;
  const cells = [["", row => row.source], ["tasks", row => row.tasks], ["score (95%)", row => range(row, "score")],
    ["metric", row => row.metric], ["R_div = 1", row => number(row.feasible_rate)], ["turns", row => number(row.turns)],
    ["operators", row => number(row.operators)], ["policy tokens", row => number(row.policy_tokens)],
    ["executor tokens", row => number(row.executor_tokens)],
    ["dollars", row => row.dollars == null ? "unknown" : number(row.dollars)]];
  for (const [method, rows] of Object.entries(page.tables).filter(([, rows]) => rows.length))
    $("tables").append(h("div", {class: "card wide", tabindex: 0}, h("h3", {}, method), h("table", {},
      h("tr", {}, cells.map(([head]) => h("th", {}, head))),
      rows.map(row => h("tr", {}, cells.map(([, cell]) => h("td", {}, say(cell(row)))))))));
}

// ---- the commonest workflows of each kind ---------------------------------------------------------------------------
function showDesigns(page) {
  const unbroken = text => text.split(/(->)/).map(part => part === "->" ? h("span", {}, part) : part);
  const design = ({workflow, n, reward}, all) => h("div", {class: "design"},
    h("div", {class: "meaning"},
      `${Math.round(100 * n / all)} % · mean reward `, h("span", {class: sign(reward)}, signed(reward))),
    h("div", {class: "share"}, h("i", {style: `width: ${100 * n / all}%`})),
    drawWorkflow(workflow, {}, true), h("code", {}, unbroken(workflow)));
  for (const [kind, thirds] of Object.entries(page.workflows))
    $("kinds").append(h("h3", {}, kind), h("div", {class: "thirds"}, thirds.map(third => h("div", {class: "card"},
      h("div", {class: "meaning"}, `steps ${[...new Set(third.steps)].join("–")}: ${third.distinct} different in ${third.n}`),
      third.top.map(entry => design(entry, third.n))))));
  if (!page.trajectories.length) $("kinds").append(h("p", {}, "No trajectory is recorded yet."));
  const sizes = Object.entries(page.difficulty).flatMap(([kind, rows]) => rows.map(row => [kind, row]));
  if (sizes.length)
    $("kinds").append(h("h3", {}, "Operators by difficulty"), h("div", {class: "card wide", tabindex: 0},
      h("div", {class: "meaning"}, "Mean number of operators, early → midway → late. A task is hard when at most a third of "
        + "this run's answers to it were right, easy above two thirds. The same size everywhere: difficulty is ignored."),
      h("table", {}, h("tr", {}, ["kind", "difficulty", "tasks", "operators"].map(head => h("th", {}, head))),
        sizes.map(([kind, row]) => h("tr", {}, h("td", {}, kind), h("td", {}, row.difficulty), h("td", {}, row.tasks),
          h("td", {}, row.operators.map(number).join(" → ")))))));
}

// ---- the trajectory browser. Its state lives in the address: #step=40&tau=3&turn=2 --------------------------------
const splitEdit = text => {  // [reasoning, edit]: the edit starts at the first <action> behind a <think> block
  const after = Math.max(0, text.lastIndexOf("</think>")), at = text.slice(after).search(/<action>/i);
  return at < 0 ? ["", text] : [text.slice(0, after + at).trim(), text.slice(after + at)];
};
const nodeNames = text => new Map(
  (parseWorkflow(text) || []).flatMap(stage => stage.nodes).map(node => [node.id, node.name]));
const workflowOf = turn => {  // with node ids where the feedback names them and they are missing in the record
  const said = /^Workflow: (.*)$/m.exec(say(turn.feedback)), text = say(turn.workflow);
  return said && said[1].replace(/\bn\d+(\.\d+)*:/g, "") === text ? said[1] : text;
};

function tauHead(tau) {
  const parts = tau.parts || {}, chip = (name, value) => typeof value === "number" &&
    h("span", {class: `chip ${value ? "" : "zero"}`}, `${name} ${value ? signed(value) : "0"}`);
  const lost = [tau.dropped && `dropped: ${say(tau.dropped)}`, tau.error].filter(Boolean).map(say).join(", ");
  const facts = [tau.source, tau.kind, tau.stop_reason, tau.version != null && `adapter ${say(tau.version)}`,
    tau.n_tokens && `${number(tau.n_policy_tokens)} of ${number(tau.n_tokens)} tokens sampled`];
  return [
    h("div", {}, h("h3", {}, `Step ${say(tau.step)}, trajectory ${tau.tau}: ${say(tau.task_id)}`),
      h("div", {class: "soft"}, facts.filter(Boolean).join(" · ")), lost && h("div", {class: "note"}, lost)),
    h("div", {class: "chips"}, h("span", {class: `reward ${sign(tau.reward)}`}, `reward ${signed(tau.reward)}`),
      ["base", "checker", "format", "operators", "structure", "answer"].map(name => chip(name, parts[name])),
      chip("advantage", tau.advantage)),
  ];
}

// What a node was asked and said: in this turn, or, where its result was kept, in the newest turn that ran it.
function nodeCard(tau, turn, picked, name, defaults) {
  const past = (tau.turns || []).slice(0, turn).map(it => it.results?.[picked]);
  const at = past.findLastIndex(result => result), result = past[at];
  const when = at + 1 === turn ? "ran in this turn" : `kept from turn ${at + 1}`;
  return h("div", {class: "card", id: "node"}, h("h3", {}, `${picked} ${name}`),
    !result && h("div", {class: "meaning"}, "did not run, or its output is not recorded"),
    result && [h("div", {class: "meaning"}, when),
      h("h4", {}, result.prompt != null ? "Prompt, written by the policy" : "Prompt, the operator's default"),
      h("pre", {}, result.prompt ?? defaults[name] ?? "not recorded"),
      h("h4", {}, "Output"), h("pre", {}, say(result.output) || "–")]);
}

// The mask over the tokens. Colour and hatching say the advantage's sign; a hollow cell is context, never a target.
function tokenCard(tau, turn, goTo, args) {
  const turns = tau.turns || [], it = turns[turn - 1];
  if (!it?.widths) return null;
  const untrained = tau.dropped ? "dropped: never trained" : tau.advantage == null ? "nothing is trained in an evaluation"
    : tau.advantage === 0 ? "advantage 0: they teach nothing" : "";
  const sampled = `trained ${untrained ? "still" : tau.advantage > 0 ? "up" : "down"}`;
  const meaning = untrained || `advantage ${signed(tau.advantage)}: made ${tau.advantage > 0 ? "more" : "less"} likely`;
  const letters = [...say(it.text)], whole = it.widths.reduce((a, b) => a + b, 0) === letters.length;
  let from = 0;
  const cells = whole ? it.widths.map(width => width ? letters.slice(from, from += width).join("") : "⏎ end") : [say(it.text)];
  return h("div", {class: "card", id: "tokens"}, h("h3", {}, "Tokens and mask"),
    h("div", {class: "strip", role: "group", "aria-label": "the whole conversation"}, turns.map((one, i) => [
      h("i", {class: "read", style: `flex-grow: ${one.n_read}`, title: `${one.n_read} tokens read`}),
      h("button", {class: sampled, style: `flex-grow: ${one.n_sampled}`, "aria-current": i + 1 === turn && "true",
        "aria-label": `Turn ${i + 1}: ${one.n_sampled} tokens sampled`, "data-key": `strip ${i}`, onclick: () => goTo(i + 1)})])),
    h("p", {class: "pieces"},
      h("span", {class: "tok read"}, `${it.n_read} tokens of ${turn > 1 ? "feedback" : "prompt and task"}`),
      cells.map(cell => h("span", {class: `tok ${sampled}`}, cell.replace(/\n/g, "↵")))),
    h("div", {class: "meaning"}, h("span", {class: "tok read"}, "read"),
      args.flags?.no_mask ? " trained too (--no-mask) · " : " mask 0, never trained · ",
      h("span", {class: `tok ${sampled}`}, "sampled"), ` ${untrained ? "" : "mask 1, "}${meaning}`,
      !whole && " · its bytes are no whole characters: borders not shown"));
}

function tauTurn(tau, turn, goTo, show) {  // turn: 1-based; show: {picked, pick, args}
  const turns = tau.turns || [], it = turns[turn - 1] || {edit: "no turn is recorded", workflow: tau.workflow};
  const text = workflowOf(it), before = nodeNames(turn > 1 ? workflowOf(turns[turn - 2]) : ""), now = nodeNames(text);
  const mark = {ran: new Set(it.executed || []), failed: new Set(it.failed || []), cached: new Set(it.cached || []),
    fresh: new Set([...now].filter(([id, name]) => before.get(id) !== name).map(([id]) => id)), ...show};
  mark.idle = new Set([...now.keys()].filter(id => it.cached && !mark.ran.has(id) && !mark.cached.has(id)));
  const refused = it.ok === false, [reasoning, edit] = splitEdit(say(it.text));
  const button = (words, to, label, attributes) => h("button",
    {onclick: () => goTo(to), disabled: to < 1 || to > turns.length, "aria-label": label, "data-key": label,
      ...attributes}, words);
  const card = (title, ...body) => h("div", {class: "card"}, h("h3", {}, title), body);
  const named = (word, ids) => ids.size && `${word}: ${[...ids].join(", ")}`;
  const legend = [mark.fresh.size && "dashed outline: new or changed", named("ran", mark.ran), named("failed", mark.failed),
    mark.cached.size && "grey: result kept", mark.idle.size && "faint: not reached",
    now.size && it.results && "click a node for its prompt and output"];
  $("status").textContent = `Turn ${turn}: ${say(it.edit)}${refused ? ", not accepted" : ""}`;
  return [
    h("div", {class: "card"},
      h("div", {class: "turns"},
        button("← previous", turn - 1, "Previous turn"), button("next →", turn + 1, "Next turn"),
        turns.map((one, i) => button(one.ok === false ? `${i + 1} ✗` : i + 1, i + 1, `Turn ${i + 1}`,
          {class: one.ok === false && "no", title: say(one.edit), "aria-current": i + 1 === turn && "true"}))),
      h("p", {style: "margin: 10px 0 2px"}, `Turn ${turn} of ${turns.length}: `, h("b", {}, say(it.edit) || "–"),
        refused && h("span", {class: "minus"}, " ✗ not accepted")),
      drawWorkflow(text, mark), h("div", {class: "meaning"}, legend.filter(Boolean).join(" · "))),
    now.has(show.picked) && nodeCard(tau, turn, show.picked, now.get(show.picked), show.args.prompts || {}),
    h("div", {class: "two"},
      card("The policy writes", reasoning && h("pre", {class: "soft"}, reasoning), h("pre", {}, edit)),
      card("The canvas answers", h("pre", {}, say(it.feedback) || "–"))),
    tokenCard(tau, turn, goTo, show.args),
    h("div", {class: "two"}, card("Answer", h("pre", {}, say(tau.answer) || "–")),
      card("Gold", h("pre", {}, (tau.answers || []).map(say).join("\nor: ")))),
  ].filter(Boolean);
}

const REWARDS = {"": () => true, below: r => r < 0, between: r => r != null && r >= 0 && r < 1,
  full: r => r >= 1, none: r => r == null};

function showBrowser(page) {
  const rows = page.trajectories;
  if (!rows.length) return $("browser").replaceChildren("No trajectory is recorded yet.");
  let index = -1, turn = 0, tau = null, picked = null;  // what is open: place in rows, 1-based turn, parsed record, node
  const link = row => `#step=${row.step}&tau=${row.tau}`;
  const visible = () => rows.map((row, place) => ({...row, place}))
    .filter(row => ["", String(row.step)].includes($("step").value) && ["", say(row.source)].includes($("source").value)
      && ["", say(row.method)].includes($("method").value) && REWARDS[$("reward").value](row.reward))
    .sort((a, b) => Number($("order").value) * (a.reward - b.reward));  // order 0: a stable sort keeps them as sampled

  function keepingFocus(element, draw) {  // drawing anew must not throw a keyboard user back to the top of the page
    const key = element.contains(document.activeElement) && document.activeElement.dataset.key;
    draw();
    const again = key && element.querySelector(`[data-key="${key}"]:not(:disabled)`);
    if (key) (again || element.querySelector("[aria-current]"))?.focus();
  }
  function showList() {
    const shown = visible();
    $("count").textContent = `${shown.length} of ${rows.length} trajectories`;
    keepingFocus($("list"), () => $("list").replaceChildren(...shown.map(row => h("li", {},
      h("a", {href: link(row), "data-key": "row" + row.place, "aria-current": row.place === index && "true"},
        h("span", {class: `reward ${sign(row.reward)}`}, signed(row.reward)),
        h("span", {title: say(row.task_id)}, say(row.task_id) || say(row.source)),
        h("span", {class: "soft"}, row.turns ? `${row.turns} ${row.turns === 1 ? "turn" : "turns"}` : say(row.method)))))));
    const [row, area] = [$("list").querySelector("[aria-current]"), $("list")].map(it => it?.getBoundingClientRect());
    if (row) $("list").scrollTop += Math.min(0, row.top - area.top) + Math.max(0, row.bottom - area.bottom);
  }
  function showTurn(wanted) {
    turn = Math.max(1, Math.min((tau.turns || []).length, wanted));
    keepingFocus($("detail"), () => $("detail").replaceChildren(...tauHead(tau),
      h("div", {class: "card"}, h("h3", {}, "Task"), h("pre", {}, say(tau.problem))),
      ...tauTurn(tau, turn, goTo, {picked, pick, args: page.args})));
    const [box, node] = [".drawing", ".drawing .fresh"].map(what => $("detail").querySelector(what));  // on a phone: what is new
    if (node) box.scrollLeft += Math.max(0, node.getBoundingClientRect().right - box.getBoundingClientRect().right + 40);
  }
  function pick(id) {
    picked = picked === id ? null : id;
    showTurn(turn);
  }
  function goTo(wanted) {
    showTurn(wanted);
    history.replaceState(null, "", `${link(rows[index])}&turn=${turn}`);
  }
  function open(place, wanted = Infinity) {  // the last turn, where the workflow is complete, unless told otherwise
    [index, tau] = [place, JSON.parse($(`tau-${place}`).textContent)];
    if (!visible().some(row => row.place === place)) {  // a link may name what the filters hide
      $("step").value = String(rows[place].step);
      for (const id of ["source", "method", "reward"]) $(id).value = "";
    }
    showList();
    showTurn(wanted);
  }
  function openAddress() {  // true if the address asks for a trajectory, be it here or not
    const asked = new URLSearchParams(location.hash.slice(1)), nth = Number(asked.get("tau") || 0);
    if (!asked.has("step")) return false;
    const place = rows.findIndex(row => String(row.step) === asked.get("step") && row.tau === nth);
    if (place >= 0) open(place, Number(asked.get("turn")) || Infinity);
    else $("detail").replaceChildren(h("p", {class: "note"},
      `Step ${asked.get("step")}, trajectory ${nth} is not in this page.`));
    return true;
  }
  function openFirst() {
    const [first] = visible();
    if (first) location.hash = link(first);
    else showList();
  }
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !tau) return;
    if (event.target.matches("input, select, pre, .drawing")) return;  // there the keys have a meaning of their own
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[event.key], other = {k: -1, j: 1}[event.key];
    const shown = visible();
    if (move) goTo(turn + move);
    const next = other && shown[shown.findIndex(row => row.place === index) + other];
    if (next) location.hash = link(next);
    if (move || other) event.preventDefault();
  }

  const rewards = new Map();
  for (const row of rows) rewards.set(row.step, [...(rewards.get(row.step) || []), row.reward].filter(r => r != null));
  for (const [step, of] of rewards)
    $("step").append(h("option", {value: step}, `${step} (mean reward ${signed(mean(of))})`));
  $("source").append(...[...new Set(rows.map(row => say(row.source)))].map(name => h("option", {value: name}, name)));
  const methods = [...new Set(rows.map(row => say(row.method)))];
  $("method").append(...methods.map(name => h("option", {value: name}, name)));
  $("method").closest("label").hidden = methods.length < 2;
  $("step").closest("label").hidden = rewards.size < 2;
  for (const id of ["step", "source", "method", "reward"]) $(id).addEventListener("change", openFirst);
  $("order").addEventListener("change", showList);
  addEventListener("hashchange", openAddress);
  addEventListener("keydown", onKey);
  $("step").value = String(rows[rows.length - 1].step);
  if (openAddress()) $("replay").scrollIntoView();
  else open(visible().reduce((best, row) => row.reward > best.reward ? row : best).place);  // the last step's best
}

const page = JSON.parse($("page").textContent);
showSummary(page);
showTables(page);
showCurves(page);
showDesigns(page);
showBrowser(page);
