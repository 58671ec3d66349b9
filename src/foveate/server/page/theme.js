// Runs before the page is painted, so that a theme that was chosen earlier does not flash.
try {
  const chosen = localStorage.getItem("foveate-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is forbidden here; the system's theme holds.
}
