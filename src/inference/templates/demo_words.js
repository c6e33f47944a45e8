// Words of a transcript: a click plays the recording from there, and the word that is being said is shown.
// Given by gr.HTML: `element` and `props` (player: a selector).
const player = () => document.querySelector(`${props.player} audio`);

element.addEventListener("click", event => {
  const word = event.target.closest("[data-start]"), audio = player();
  if (!word || !audio) return;
  audio.currentTime = Number(word.dataset.start);
  audio.play();
});

document.addEventListener("timeupdate", event => { // captured: it does not bubble
  if (event.target !== player()) return;
  const words = [...element.querySelectorAll("[data-start]")];
  element.querySelector(".now")?.classList.remove("now");
  words.findLast(word => Number(word.dataset.start) <= event.target.currentTime)?.classList.add("now");
}, true);
