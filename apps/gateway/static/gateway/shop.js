// The page of the shop: orders through the REST API, and hears through the WebSocket what comes of it.

const MAX_TOLD = 50;
const FIRST_PAUSE = 500; // ms before the first attempt to reconnect; doubled with each
const LONGEST_PAUSE = 15_000;

const byId = (id) => document.getElementById(id);
const form = byId("order");
const products = new Map(); // id -> {product, row, input}

// What the API says

async function api(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The shop cannot be reached.");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(body.detail || body.title || `The shop answered with ${response.status}.`);
  }
  return body;
}

// Prices are in minor units: how many make one is a matter of the currency.
function money(amount, currency) {
  const format = new Intl.NumberFormat(undefined, { style: "currency", currency });
  return format.format(amount / 10 ** format.resolvedOptions().maximumFractionDigits);
}

// Fills a copy of a template; as text only, whatever the values hold.
function filled(template, values) {
  const element = byId(template).content.firstElementChild.cloneNode(true);
  for (const [name, value] of Object.entries(values)) {
    element.querySelector(`[data-of="${name}"]`).textContent = value;
  }
  return element;
}

// Products and the order

async function showUsers() {
  const { data } = await api("/api/users?limit=100");
  byId("user").replaceChildren(...data.map((user) => new Option(`${user.name}, ${user.email}`, user.id)));
}

async function showProducts() {
  const { data } = await api("/api/products?limit=100");
  for (const product of data) {
    if (!products.has(product.id)) {
      products.set(product.id, newRow(product));
    }
    update(products.get(product.id), product);
  }
  byId("goods-empty").hidden = data.length > 0;
  byId("goods-empty").textContent = "There is nothing to buy.";
  showTotal();
}

function newRow(product) {
  const row = filled("product", {
    name: product.name,
    description: product.description,
    label: `Quantity of ${product.name}`,
  });
  byId("products").append(row);
  return { row, input: row.querySelector("input") };
}

function update(entry, product) {
  entry.product = product;
  entry.row.querySelector('[data-of="price"]').textContent = money(product.price, product.currency);
  const stock = entry.row.querySelector('[data-of="stock"]');
  stock.textContent = product.available > 0 ? `${product.available} in stock` : "sold out";
  stock.dataset.level = product.available === 0 ? "none" : product.available < 5 ? "low" : "fine";
  entry.input.disabled = product.available === 0;
}

function chosen() {
  return [...products.values()]
    .map(({ product, input }) => ({ product, quantity: Number(input.value) || 0 }))
    .filter(({ quantity }) => quantity > 0);
}

function showTotal() {
  const sums = new Map();
  for (const { product, quantity } of chosen()) {
    sums.set(product.currency, (sums.get(product.currency) ?? 0) + product.price * quantity);
  }
  byId("total").textContent = [...sums].map(([currency, sum]) => money(sum, currency)).join(" + ") || "–";
  for (const { row, input } of products.values()) {
    row.classList.toggle("chosen", Number(input.value) > 0);
  }
}

async function placeOrder(event) {
  event.preventDefault();
  const lines = chosen().map(({ product, quantity }) => ({ product_id: product.id, quantity }));
  if (lines.length === 0) {
    showResult("problem", "Choose how many of at least one product.");
    return;
  }
  const button = byId("place");
  button.disabled = true;
  showResult("waiting", "Placing your order …");
  try {
    const order = await api("/api/orders", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ user_id: form.user.value, lines, payment_token: form.payment_token.value }),
    });
    showResult("done", `Order ${order.number} is ${order.status}: ${money(order.total, order.currency)}.`);
    for (const { input } of products.values()) {
      input.value = 0;
    }
  } catch (problem) {
    showResult("problem", problem.message);
  } finally {
    button.disabled = false;
    button.focus(); // a button that was disabled has lost it
  }
  await showProducts().catch(() => {}); // the old stock may stay in view
}

function showResult(kind, text) {
  const result = byId("result");
  result.hidden = false;
  result.dataset.kind = kind;
  result.textContent = text;
}

// What the shop tells

const told = new Set(); // the ids of what is in the list

function tell(notification, fresh) {
  if (told.has(notification.id)) {
    return;
  }
  const at = new Date(notification.created_at);
  const time = at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
  const element = filled("notification", { title: notification.title, body: notification.body, time });
  element.querySelector("time").dateTime = notification.created_at;
  element.dataset.id = notification.id;
  element.dataset.at = at.getTime();
  element.dataset.kind = notification.kind;
  element.classList.toggle("fresh", fresh);
  told.add(notification.id);

  const list = byId("told");
  list.insertBefore(element, [...list.children].find((other) => Number(other.dataset.at) <= at.getTime()) ?? null);
  byId("told-empty").hidden = true;
  if (list.children.length > MAX_TOLD) {
    told.delete(list.lastElementChild.dataset.id);
    list.lastElementChild.remove();
  }
}

function forgetTold() {
  told.clear();
  byId("told").replaceChildren();
  byId("told-empty").hidden = false;
}

// Listens for one user until it is stopped; comes back by itself.
class Listener {
  #user;
  #socket = null;
  #attempts = 0;
  #timer = 0;
  #stopped = false;

  constructor(user) {
    this.#user = user;
    this.#connect();
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#socket?.close();
  }

  #connect() {
    showConnection("waiting", "Connecting …");
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/ws/notifications`);
    this.#socket = socket;
    socket.addEventListener("open", () => socket.send(JSON.stringify({ user_id: this.#user })));
    socket.addEventListener("message", ({ data }) => this.#hear(JSON.parse(data)));
    socket.addEventListener("close", () => this.#comeBack());
  }

  #hear(message) {
    if (this.#stopped) {
      return;
    }
    if (message.type === "ready") {
      this.#attempts = 0;
      showConnection("live", "Connected");
      this.#catchUp().catch(() => {}); // what is new still arrives
    } else if (message.type === "notification") {
      tell(message.notification, true);
    }
  }

  // What was said while nobody listened is in the inbox.
  async #catchUp() {
    const { data } = await api(`/api/notifications?${new URLSearchParams({ user_id: this.#user })}`);
    if (!this.#stopped) {
      data.toReversed().forEach((notification) => tell(notification, false));
    }
  }

  #comeBack() {
    if (this.#stopped) {
      return;
    }
    const longest = Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** this.#attempts++);
    showConnection("lost", "Not connected, trying again …");
    // By chance, so that not all browsers of a server that was restarted come back at once.
    this.#timer = setTimeout(() => this.#connect(), longest * (0.5 + Math.random() / 2));
  }
}

function showConnection(state, text) {
  const connection = byId("connection");
  connection.dataset.state = state;
  connection.textContent = text;
}

let listener = null;

function listen() {
  listener?.stop();
  forgetTold();
  listener = new Listener(form.user.value);
}

// Start

form.addEventListener("submit", placeOrder);
form.addEventListener("input", showTotal);
byId("user").addEventListener("change", listen);

async function start() {
  try {
    await Promise.all([showUsers(), showProducts()]);
    listen();
  } catch (problem) {
    showConnection("lost", `${problem.message} Trying again …`);
    setTimeout(start, 3000);
  }
}

start();
