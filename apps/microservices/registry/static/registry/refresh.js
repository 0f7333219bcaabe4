// Swaps the rows of a change list every few seconds; one button stops it.

const EACH = 5000;
const PATIENCE = 4000;

const list = document.querySelector("#changelist-form");

if (list && !document.querySelector("#changelist-form .errornote")) {
  start();
}

function start() {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "registry-refresh";
  document.querySelector("#content h1, #content-main").before(button);

  let timer = 0;
  const say = (text) => { button.textContent = text; };
  const run = () => {
    timer = window.setInterval(turn, EACH);
    say("Stop updating");
  };
  const stop = (text) => {
    window.clearInterval(timer);
    timer = 0;
    say(text);
  };
  const turn = async () => {
    if (document.hidden) {
      return;
    }
    const page = await newest();
    if (timer === 0 || page === null) {
      return; // stopped meanwhile, or not to be had just now
    }
    if (!swap(page)) {
      stop("Reload to update");
    }
  };

  button.addEventListener("click", () => {
    if (timer) {
      stop("Update every 5 s");
    } else {
      run();
      turn();
    }
  });
  run();
}

async function newest() {
  try {
    const answer = await fetch(window.location.href, { signal: AbortSignal.timeout(PATIENCE) });
    return answer.ok ? new DOMParser().parseFromString(await answer.text(), "text/html") : null;
  } catch {
    return null;
  }
}

// The table body itself stays, and so do the check boxes: Django's own script listens to them.
function swap(page) {
  const body = document.querySelector("#result_list tbody");
  const news = page.querySelector("#result_list tbody");
  if (!page.querySelector("#changelist-form")) {
    return false; // signed out
  }
  if (!body || !news) {
    if (Boolean(body) !== Boolean(news)) {
      window.location.reload(); // the list has become empty, or has its first row
    }
    return true;
  }
  const boxes = new Map();
  for (const box of body.querySelectorAll("input.action-select")) {
    boxes.set(box.value, box);
  }
  const focused = document.activeElement;
  const link = body.contains(focused) ? focused.getAttribute("href") : null;

  const rows = [...news.rows].map((row) => document.importNode(row, true));
  for (const row of rows) {
    const box = row.querySelector("input.action-select");
    const old = box && boxes.get(box.value);
    if (old) {
      box.replaceWith(old);
      row.classList.toggle("selected", old.checked);
    }
  }
  body.replaceChildren(...rows);
  for (const selector of [".paginator", "#changelist-filter"]) {
    const [old, fresh] = [document.querySelector(selector), page.querySelector(selector)];
    if (old && fresh && !old.contains(focused)) {
      old.replaceChildren(...document.importNode(fresh, true).childNodes);
    }
  }
  if (focused && focused.isConnected) {
    focused.focus();
  } else if (link) {
    [...body.querySelectorAll("a")].find((anchor) => anchor.getAttribute("href") === link)?.focus();
  }
  return true;
}
