// Colours that were chosen, before anything is drawn, so that nothing flashes.
try {
    const theme = JSON.parse(localStorage.getItem("ferropt.theme"));
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
    // Without storage it is as the system says.
}
