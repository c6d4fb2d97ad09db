"use strict";
const all = [...document.querySelectorAll("figure.note")], notes = [...document.querySelectorAll("#notes > figure")];
const found = Object.fromEntries(["family", "lowest", "highest", "shown"].map(id => [id, document.getElementById(id)]));
let at = -1;

const visible = () => all.filter(note => !note.hidden);
const player = note => note.querySelector("audio");

function choose() {
  const family = found.family ? found.family.value : "";
  const low = found.lowest ? Number(found.lowest.value) : -1, high = found.highest ? Number(found.highest.value) : 128;
  const whole = !found.lowest || (found.lowest.selectedIndex === 0
    && found.highest.selectedIndex === found.highest.length - 1);
  for (const note of notes) {
    const pitch = "pitch" in note.dataset ? Number(note.dataset.pitch) : null;
    note.hidden = (family !== "" && note.dataset.family !== family)
      || !(pitch === null ? whole : low <= pitch && pitch <= high);
    if (note.hidden) player(note).pause();
  }
  found.shown.textContent = `${notes.filter(note => !note.hidden).length} of ${notes.length} shown`;
}

function go(step) {
  const there = visible();
  if (!there.length) return;
  const place = there.indexOf(all[at]);
  const next = there[place < 0 ? (step > 0 ? 0 : there.length - 1)
    : Math.min(Math.max(place + step, 0), there.length - 1)];
  mark(next);
  next.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest"});
  player(next).currentTime = 0;
  player(next).play().catch(() => {});
}

function mark(note) {
  at = all.indexOf(note);
  for (const other of all) other.classList.toggle("current", other === note);
}

document.addEventListener("keydown", event => {
  if (event.target.closest("select, input") || event.ctrlKey || event.altKey || event.metaKey) return;
  const step = {ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1, Home: -Infinity, End: Infinity}[event.key];
  if (step) go(step);
  else if (event.key === " " && at >= 0) {
    const audio = player(all[at]);
    if (audio.paused) audio.play().catch(() => {}); else audio.pause();
  } else return;
  event.preventDefault();
}, true);
document.addEventListener("play", event => {
  for (const note of all) if (player(note) !== event.target) player(note).pause();
  mark(event.target.closest("figure"));
}, true);
for (const select of [found.family, found.lowest, found.highest]) if (select) select.addEventListener("change", choose);
choose();
