// What Quarto's pages can do too: copy a block of code, and search the book.
for (const pre of document.querySelectorAll("main pre.sourceCode")) {
  const button = document.createElement("button");
  Object.assign(button, {textContent: "Copy", className: "copy", type: "button"});
  button.onclick = async () => {
    await navigator.clipboard.writeText(pre.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  pre.parentElement.append(button);
}

const field = document.querySelector("input[type=search]"), box = document.querySelector(".found");
field.addEventListener("focus", () => {
  if (document.querySelector("script[src='search.js']")) return;
  document.head.append(Object.assign(document.createElement("script"), {src: "search.js", onload: search}));
});
field.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) { event.preventDefault(); field.focus(); }
  if (event.key === "Escape") { field.value = ""; search(); }
});

function search() {  // every word must occur; titles and headings come first
  const words = field.value.toLowerCase().split(/\s+/).filter(w => w), hits = [];
  box.replaceChildren();
  box.hidden = !words.length;
  if (!words.length || !window.SECTIONS) return;
  for (const [url, title, heading, text] of SECTIONS) {
    const head = `${title} ${heading}`.toLowerCase(), all = `${head} ${text.toLowerCase()}`;
    if (words.every(w => all.includes(w))) hits.push([words.filter(w => head.includes(w)).length, url, title, heading, text]);
  }
  hits.sort((a, b) => b[0] - a[0]);
  for (const [, url, title, heading, text] of hits.slice(0, 12)) {
    const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 50);
    const link = Object.assign(document.createElement("a"), {href: url, textContent: heading ? `${title}: ${heading}` : title});
    const part = Object.assign(document.createElement("p"), {textContent: text.slice(at, at + 160)});
    box.append(link, part);
  }
  if (!hits.length) box.textContent = "Nothing found.";
}
